"""`declip inspect`: what a checkpoint is, without building the model."""

from pathlib import Path
from typing import Annotated

import typer

from declip_cli.cli.console import emit, note, user_errors
from declip_cli.cli.options import Assume, Json


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="Run folder, model folder, checkpoint of any project, or MODEL/PRETRAINED of OpenCLIP."),
    ],
    assume: Assume = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is: family, architecture, method, preprocessing, training, scores.

    Example: `declip inspect ViT-B-32.pt --json`
    """
    with user_errors():
        from declip_cli.interop.assumptions import parse_assumptions
        from declip_cli.interop.inspect import inspect_model

        report = inspect_model(file, parse_assumptions(assume or ()))
        for line in report["assumed"]:
            note(f"note: {file}: {line}")
        emit(report, as_json=as_json)
