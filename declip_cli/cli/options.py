"""Options that several commands share, written once."""

from pathlib import Path
from typing import Annotated, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
Model = Annotated[
    Optional[Path],  # noqa: UP007, UP045  (Typer reads this form on every Python it supports)
    typer.Option("--model", help="Run folder, model folder or checkpoint. Default: the newest run under runs/."),
]
DataRoot = Annotated[
    Optional[Path],  # noqa: UP007, UP045
    typer.Option("--data-root", help="Where evaluation sets lie. Default: $DECLIP_DATA, else data/."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures or texts per forward pass.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 takes the cores there are.")]
