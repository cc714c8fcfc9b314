"""A model folder: safetensors and metadata, written whole, read strictly; OpenCLIP reads it too."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip_cli import __version__
from declip_cli.config import ModelConfig
from declip_cli.errors import DeclipError, ModelError
from declip_cli.files import SUMS_FILE, check_folder, existing_folder, new_folder
from declip_cli.model.architectures import describe_architecture, restore_architecture
from declip_cli.model.clip import IMAGE_MEAN, IMAGE_STD, DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.interop import load_foreign, open_clip_config, open_clip_state

WEIGHTS_FILE = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
OWN_CONFIG_FILE = "declip.json"
EXTRA_FILE = "declip_extra.safetensors"
"""What OpenCLIP has no place for: the mask token's embedding and the token-wise heads."""
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedModel:
    """A dual encoder with all that is needed to use it as it was trained."""

    encoder: DualEncoder
    name: str
    """Where it came from."""
    method: str
    arch: str
    token_wise: bool
    """Whether pictures and texts are compared token by token (FILIP)."""
    image_side_px: int
    resize_px: int
    """Length of the shorter side before the centre crop."""
    context_length: int
    fingerprint: str
    """sha256 of weights and preprocessing; empty for a model that is still being trained."""
    interpolation: str = "bilinear"
    """Filter with which pictures are resized: `bilinear` or `bicubic` (OpenAI, most of OpenCLIP)."""


def default_resize_px(image_side_px: int) -> int:
    """Return the shorter side before the centre crop: 256 for 224, the whole picture for small models.

    Source: ONECROP, P/data/imagenet_dataloader.py.
    """
    return round(image_side_px * 256 / 224) if image_side_px >= 128 else image_side_px


def save_model(encoder: DualEncoder, folder: Path, *, config: ModelConfig, method: str) -> None:
    """Write a model folder that `load_model` and OpenCLIP (`local-dir:`) read.

    Args:
        encoder: the model, on any device.
        folder: appears whole, with the digests of its files, in the place of an earlier one.
        config: how the encoder was built.
        method: name of the method that trained it.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    weights, extra = open_clip_state(state)
    own = {
        "format": FORMAT,
        "declip_version": __version__,
        "method": method,
        "token_wise": method == "filip",
        "has_token_wise_heads": encoder.token_wise is not None,
        "arch": config.arch,
        "architecture": describe_architecture(encoder.architecture),
        "preprocessing": {
            "image_side_px": encoder.architecture.image_side_px,
            "resize_px": default_resize_px(encoder.architecture.image_side_px),
            "interpolation": "bilinear",
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
        },
        "tokenizer": {"vocabulary": "clip-bpe", "context_length": encoder.architecture.text.context_length},
    }
    with new_folder(folder) as new:
        save_file(weights, new / WEIGHTS_FILE)
        save_file(extra, new / EXTRA_FILE)
        _write_json(open_clip_config(encoder.architecture, IMAGE_MEAN, IMAGE_STD), new / OPEN_CLIP_CONFIG_FILE)
        _write_json(own, new / OWN_CONFIG_FILE)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def runs_root() -> Path:
    """Return the folder that holds the runs: `$DECLIP_RUNS`, else `runs`."""
    return Path(os.environ.get("DECLIP_RUNS") or "runs")


def find_newest_run(root: Path) -> Path:
    """Find the run whose model was written last.

    Args:
        root: folder of run folders.

    Returns:
        The run folder.

    Raises:
        ModelError: there is none.
    """
    found = [path for path in root.glob("*/model") if (path / OWN_CONFIG_FILE).is_file()]
    if not found:
        raise ModelError(
            f"no model found: no run with a finished model under {root}/",
            remedy="name one with --model, or train one: declip pretrain --data demo",
        )
    return max(found, key=lambda path: (path / WEIGHTS_FILE).stat().st_mtime_ns).parent


def load_model(path: Path | None, *, device: str | torch.device = "cpu") -> PretrainedModel:
    """Open a run folder, a model folder or a checkpoint file of another project, for evaluation.

    Args:
        path: where the model lies; None takes the newest run.
        device: where to put it.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: nothing there, or it is incomplete or does not fit.
    """
    path = find_newest_run(runs_root()) if path is None else path
    if not path.exists():
        raise ModelError(f"no model at {path}", remedy="--model takes a run folder, a model folder or a checkpoint")
    inner = existing_folder(path / "model")
    folder = inner if inner.is_dir() else existing_folder(path)
    if path.is_file() or not (folder / OWN_CONFIG_FILE).is_file():
        return _load_foreign(path if path.is_file() else folder, device)
    own, state, fingerprint = _read_folder(folder)
    has_heads = bool(own["has_token_wise_heads"])
    encoder = DualEncoder(restore_architecture(own["architecture"]), token_wise_dim=TOKEN_WISE_DIM if has_heads else 0)
    try:
        encoder.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ModelError(
            f"the weights in {folder} do not fit its {OWN_CONFIG_FILE}: {error}", remedy="copy the folder again"
        ) from error
    preprocessing = own["preprocessing"]
    return PretrainedModel(
        encoder=encoder.eval().to(device),
        name=str(path),
        method=own["method"],
        arch=own["arch"],
        token_wise=own["token_wise"],
        image_side_px=preprocessing["image_side_px"],
        resize_px=preprocessing["resize_px"],
        context_length=encoder.architecture.text.context_length,
        fingerprint=fingerprint,
    )


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read settings, weights and fingerprint; once more where a run in progress replaced the folder meanwhile."""
    for is_last_try in (False, False, True):
        before = _sums(folder)
        try:
            if before:
                check_folder(folder)
            own, state = _read_own_config(folder), _read_state(folder)
            fingerprint = _fingerprint(folder / WEIGHTS_FILE, folder / EXTRA_FILE, folder / OWN_CONFIG_FILE)
            if _sums(folder) == before:
                return own, state, fingerprint
        except (OSError, ValueError, ModelError) as error:
            if is_last_try or _sums(folder) == before:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(f"the model in {folder} is damaged: {error}", remedy="copy the folder again") from error
    raise ModelError(f"the model in {folder} changes while it is read", remedy="try again in a moment")


def _sums(folder: Path) -> bytes:
    """Read the list of digests; empty for a folder that another version or tool has written."""
    try:
        return (folder / SUMS_FILE).read_bytes()
    except OSError:
        return b""


def _read_own_config(folder: Path) -> dict[str, Any]:
    try:
        own: dict[str, Any] = json.loads((folder / OWN_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder / OWN_CONFIG_FILE}: {error}", remedy="copy the folder again") from error
    if own.get("format") != FORMAT or "architecture" not in own:
        raise ModelError(
            f"{folder} has model format {own.get('format')!r}, this declip reads {FORMAT}",
            remedy="pip install --upgrade declip",
        )
    return own


def _read_state(folder: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        extra = load_file(folder / EXTRA_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}", remedy="copy the folder again") from error
    mask = extra.pop("mask_embedding")
    weights["token_embedding.weight"] = torch.cat([weights["token_embedding.weight"], mask[None]])
    state = {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": v for name, v in weights.items()}
    return state | extra


def _load_foreign(path: Path, device: str | torch.device) -> PretrainedModel:
    try:
        foreign = load_foreign(path)
    except DeclipError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path} is not a model that declip can read: {error}",
            remedy="--model takes a run folder, a model folder, or a checkpoint of OpenCLIP or the original DeCLIP",
        ) from error
    architecture = foreign.encoder.architecture
    return PretrainedModel(
        encoder=foreign.encoder.eval().to(device),
        name=str(path),
        method=foreign.method,
        arch=foreign.project,
        token_wise=foreign.method == "filip",
        image_side_px=architecture.image_side_px,
        resize_px=foreign.resize_px,
        context_length=architecture.text.context_length,
        interpolation=foreign.interpolation,
        fingerprint=_fingerprint(*([path] if path.is_file() else sorted(path.glob("open_clip_*")))),
    )


def _fingerprint(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
