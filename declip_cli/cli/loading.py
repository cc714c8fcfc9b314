"""Open the model that an evaluation command was given, on the best device there is."""

from pathlib import Path
from typing import TYPE_CHECKING

from declip_cli.cli.console import note

if TYPE_CHECKING:
    from declip_cli.model.checkpoint import PretrainedModel


def open_model(path: Path | None, *, threads: int = 0) -> "PretrainedModel":
    """Load a model for evaluation and say on stderr which one was chosen, if none was named.

    Args:
        path: the option `--model`; None takes the newest run.
        threads: CPU threads; 0 leaves what there is.

    Returns:
        The model, on a GPU if there is one.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    import torch

    from declip_cli.interop.read import load_model

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = load_model(path, device=device)
    if path is None:
        note(f"model: {model.name}")
    return model
