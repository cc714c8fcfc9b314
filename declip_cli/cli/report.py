"""`declip report`: the page of a run, or a comparison of several."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from declip_cli.cli.console import emit, user_errors
from declip_cli.cli.options import Json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    out: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(metavar="FILE", help="The page.", show_default="report.html in the first folder"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page for a browser: curves, scores, settings and advice of a run, or how several differ.

    Example: `declip report runs/declip-vit-b32 runs/clip-vit-b32 --out both.html`
    """
    with user_errors():
        from declip_cli.pages.run_page import write_report

        emit({"out": str(write_report(runs, out))}, as_json=as_json)
