"""Find the data files of the package, in a checkout or an installed wheel."""

from pathlib import Path

from declip_cli.errors import DeclipError

_PACKAGE = Path(__file__).resolve().parent


def asset_path(name: str) -> Path:
    """Locate one file or folder of `assets/`, such as `"recipes/declip-demo.toml"`.

    Raises:
        DeclipError: the installation lacks this file.
    """
    for root in (_PACKAGE / "_assets", _PACKAGE.parent / "assets"):
        if (root / name).exists():
            return root / name
    raise DeclipError(
        f"the data file {name!r} is missing from this installation (looked beside {_PACKAGE})",
        remedy="install declip again: pip install --force-reinstall declip",
    )
