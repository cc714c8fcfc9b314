"""The door for models: a run folder, a model folder of ours, or a checkpoint of another project."""

import os
from pathlib import Path

import torch

from declip_cli.errors import DeclipError, ModelError
from declip_cli.interop.open_clip import load_foreign
from declip_cli.model.checkpoint import (
    PretrainedModel,
    find_folder,
    find_newest_run,
    fingerprint_of,
    read_model,
    runs_root,
)

_TAKEN = "a run folder, a model folder, or a checkpoint of OpenCLIP or the original DeCLIP"


def load_model(path: Path | None, *, device: str | torch.device = "cpu", option: str = "--model") -> PretrainedModel:
    """Open a run folder, a model folder or a checkpoint of another project.

    Args:
        path: where the model lies; None takes the newest run.
        device: where to put it.
        option: of the command line, with which the user named it; for messages.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: nothing there, or it is incomplete, damaged, contradicts itself or does not fit.
    """
    path = find_newest_run(runs_root()) if path is None else path
    if not os.path.exists(path):
        raise ModelError(f"no model at {path}", remedy=f"{option} takes {_TAKEN}")
    folder = find_folder(path)
    model = _read_foreign(path, option) if folder is None else read_model(folder, name=str(path))
    model.encoder.to(device)
    return model


def _read_foreign(path: Path, option: str) -> PretrainedModel:
    try:
        foreign = load_foreign(path)
    except DeclipError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path} is not a model that declip can read: {' '.join(str(error).split()):.300}",
            remedy=f"{option} takes {_TAKEN}",
        ) from error
    return PretrainedModel(
        encoder=foreign.encoder.eval(),
        name=str(path),
        method=foreign.method,
        arch=foreign.project,
        token_wise=foreign.method == "filip",
        preprocessing=foreign.preprocessing,
        context_length=foreign.encoder.architecture.text.context_length,
        fingerprint=fingerprint_of(*([path] if path.is_file() else sorted(path.glob("open_clip_*")))),
    )
