"""`declip doctor`: what this installation and this machine have, for bug reports."""

from declip_cli.cli.console import emit, user_errors
from declip_cli.cli.options import DataRoot, Json


def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Say what is here: versions, devices, number formats, threads, caches, data sets, optional packages.

    Example: `declip doctor --json > report.json`
    """
    with user_errors():
        from declip_cli.evaluate.installation import examine

        emit(examine(data_root), as_json=as_json)
