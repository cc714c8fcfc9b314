"""Options that several commands share, and what is done with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from declip_cli.cli.console import note

if TYPE_CHECKING:
    from declip_cli.data.dataset import Skips
    from declip_cli.model.checkpoint import PretrainedModel

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Model = Annotated[
    Optional[Path],  # noqa: UP007, UP045  (Typer reads this form on every Python it supports)
    typer.Option("--model", help="Run folder, model folder or checkpoint. Default: the newest run under runs/."),
]
Assume = Annotated[
    Optional[list[str]],  # noqa: UP007, UP045
    typer.Option(
        "--assume",
        metavar="KEY=VALUE",
        help="What the checkpoint lacks: activation, heads, text_heads, mean, std, resize, interpolation, crop.",
    ),
]
DataRoot = Annotated[
    Optional[Path],  # noqa: UP007, UP045
    typer.Option("--data-root", help="Folder of the evaluation sets. Default: $DECLIP_DATA, else data/."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images or texts per forward pass.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 uses all available cores.")]
Html = Annotated[
    Optional[Path],  # noqa: UP007, UP045
    typer.Option("--html", metavar="FILE", help="Also write a page: accuracy by class, confused pairs, mistakes."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Recompute all features.")]


def open_model(path: Path | None, *, assume: list[str] | None = None, threads: int = 0) -> "PretrainedModel":
    """Load a model for evaluation, on a GPU if there is one; say on stderr which one, if none was named.

    Args:
        path: the option `--model`; None takes the newest run.
        assume: the words of `--assume`.
        threads: CPU threads; 0 leaves what there is.

    Raises:
        ModelError: there is none, or it cannot be read.
        ConfigError: `assume` cannot be used.
    """
    import torch

    from declip_cli.interop.assumptions import parse_assumptions
    from declip_cli.interop.read import load_model

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = load_model(path, device=device, given=parse_assumptions(assume or ()), log=note)
    if path is None:
        note(f"model: {model.name}")
    return model


def note_skipped(name: str, skipped: "Skips") -> None:
    """Say on stderr what was skipped in a data set, cause by cause."""
    for cause, (count, first) in skipped.items():
        note(f"{name}: skipped {count} images, {cause} (first: {first})")
