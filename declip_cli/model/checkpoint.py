"""A model folder: safetensors and metadata, written whole, read strictly; OpenCLIP reads it too."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip_cli import __version__
from declip_cli.config import MethodName, ModelConfig
from declip_cli.errors import DeclipError, ModelError
from declip_cli.files import SUMS_FILE, check_folder, existing_folder, new_folder, parse_json
from declip_cli.model.architectures import Architecture, VitDims, describe_architecture
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.interop import load_foreign, open_clip_config, open_clip_state, set_pixels
from declip_cli.model.shapes import check_heads, infer_architecture

WEIGHTS_FILE = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
OWN_CONFIG_FILE = "declip.json"
EXTRA_FILE = "declip_extra.safetensors"
"""What OpenCLIP has no place for: the mask token's embedding and the token-wise heads."""
FORMAT = 1
_TAKEN = "a run folder, a model folder, or a checkpoint of OpenCLIP or the original DeCLIP"
_PARSING = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError)
"""What reading damaged configurations and weights may raise."""


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

    @property
    def device(self) -> torch.device:
        """Where the encoder lies."""
        return next(self.encoder.parameters()).device


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
    mean, std = _digits(encoder.pixel_mean), _digits(encoder.pixel_std)
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
            "mean": mean,
            "std": std,
        },
        "tokenizer": {"vocabulary": "clip-bpe", "context_length": encoder.architecture.text.context_length},
    }
    with new_folder(folder) as new:
        save_file(weights, new / WEIGHTS_FILE)
        save_file(extra, new / EXTRA_FILE)
        _write_json(open_clip_config(encoder.architecture, mean, std), new / OPEN_CLIP_CONFIG_FILE)
        _write_json(own, new / OWN_CONFIG_FILE)


def _digits(values: Tensor) -> list[float]:
    """Write float32 values with as few decimal digits as give them back."""
    return [float(str(value)) for value in values.float().cpu().numpy()]


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


def load_model(path: Path | None, *, device: str | torch.device = "cpu", option: str = "--model") -> PretrainedModel:
    """Open a run folder, a model folder or a checkpoint file of another project, for evaluation.

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
    inner = existing_folder(path / "model")
    folder = inner if inner.is_dir() else existing_folder(path)
    is_own = (folder / OWN_CONFIG_FILE).is_file() or OWN_CONFIG_FILE.encode() in _sums(folder)
    if path.is_file() or not is_own:
        return _load_foreign(path if path.is_file() else folder, device, option)
    own, open_clip, state, fingerprint = _read_folder(folder)
    try:
        architecture = _check_own(own, open_clip, state)
        encoder = DualEncoder(architecture, token_wise_dim=TOKEN_WISE_DIM if own["has_token_wise_heads"] else 0)
        encoder.load_state_dict(state)
        set_pixels(encoder, own["preprocessing"]["mean"], own["preprocessing"]["std"])
    except (ModelError, *_PARSING) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(f"the model in {folder} is damaged: {reason}", remedy="copy the folder again") from error
    return PretrainedModel(
        encoder=encoder.eval().to(device),
        name=str(path),
        method=own["method"],
        arch=own["arch"],
        token_wise=own["token_wise"],
        image_side_px=architecture.image_side_px,
        resize_px=own["preprocessing"]["resize_px"],
        context_length=architecture.text.context_length,
        interpolation=own["preprocessing"]["interpolation"],
        fingerprint=fingerprint,
    )


def _check_own(own: dict[str, Any], open_clip: dict[str, Any], state: dict[str, Tensor]) -> Architecture:
    """Read the architecture off the weights; whatever the two configurations say must agree with it.

    Raises:
        ModelError: they contradict each other.
        KeyError, TypeError, …: one of `_PARSING`: something is missing or of another kind.
    """
    given, pixels = own["architecture"], own["preprocessing"]
    found = infer_architecture(state, quick_gelu=bool(given["quick_gelu"]))
    vision_heads, text_heads = given["vision"]["num_heads"], given["text"]["num_heads"]
    check_heads(vision_heads, found.vision.width * (1 if isinstance(found.vision, VitDims) else 32))
    check_heads(text_heads, found.text.width)
    found = replace(
        found, vision=replace(found.vision, num_heads=vision_heads), text=replace(found.text, num_heads=text_heads)
    )
    has_heads = any(name.startswith("token_wise.") for name in state)
    side = found.image_side_px
    wanted = {
        "architecture": describe_architecture(found),
        "has_token_wise_heads": has_heads,
        "token_wise": bool(own["token_wise"]) and has_heads,
        "method": own["method"] if own["method"] in get_args(MethodName) else "one of the methods there are",
        "arch": str(own["arch"]),
        "preprocessing": {
            "image_side_px": side,
            "resize_px": min(max(int(pixels["resize_px"]), side), 8 * side),
            "interpolation": "bicubic" if pixels["interpolation"] == "bicubic" else "bilinear",
        },
        "tokenizer": {"vocabulary": "clip-bpe", "context_length": found.text.context_length},
    }
    _compare(wanted, own, OWN_CONFIG_FILE, "the weights")
    _compare(open_clip_config(found, pixels["mean"], pixels["std"]), open_clip, OPEN_CLIP_CONFIG_FILE, OWN_CONFIG_FILE)
    return found


def _compare(wanted: Any, given: Any, file: str, other: str, field: str = "") -> None:  # noqa: ANN401  (JSON)
    """Raise ModelError for the first field in which a configuration file and what it should say differ."""
    if isinstance(wanted, dict) and isinstance(given, dict):
        for name, value in wanted.items():
            _compare(value, given.get(name), file, other, f"{field}.{name}".removeprefix("."))
        return
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if wanted != given or isinstance(wanted, bool) != isinstance(given, bool):
        raise ModelError(
            f"{field} is {given!r:.60} in {file}, by {other} {wanted!r:.60}", remedy="copy the folder again"
        )


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], str]:
    """Read both configurations, weights and fingerprint; once more where a run replaced the folder meanwhile."""
    for is_last_try in (False, False, True):
        before = _sums(folder)
        try:
            if before:
                check_folder(folder)
            own, state = _read_own_config(folder), _read_state(folder)
            open_clip = _read_config(folder / OPEN_CLIP_CONFIG_FILE)
            fingerprint = _fingerprint(folder / WEIGHTS_FILE, folder / EXTRA_FILE, folder / OWN_CONFIG_FILE)
            if _sums(folder) == before:
                return own, open_clip, state, fingerprint
        except (OSError, ValueError, ModelError) as error:
            if is_last_try or _sums(folder) == before:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(
                    f"the model in {folder} is damaged: {error}", remedy="copy the folder again"
                ) from error
    raise ModelError(f"the model in {folder} changes while it is read", remedy="try again in a moment")


def _sums(folder: Path) -> bytes:
    """Read the list of digests; empty for a folder that another version or tool has written."""
    try:
        return (folder / SUMS_FILE).read_bytes()
    except OSError:
        return b""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", remedy="copy the folder again") from error
    if not isinstance(config, dict):
        raise ModelError(f"cannot read {path}: no JSON object", remedy="copy the folder again")
    return config


def _read_own_config(folder: Path) -> dict[str, Any]:
    own = _read_config(folder / OWN_CONFIG_FILE)
    if own.get("format") != FORMAT:
        raise ModelError(
            f"{folder} has model format {own.get('format')!r:.60}, this declip reads {FORMAT}",
            remedy="pip install --upgrade declip",
        )
    return own


def _read_state(folder: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        extra = load_file(folder / EXTRA_FILE)
        mask = extra.pop("mask_embedding")
        weights["token_embedding.weight"] = torch.cat([weights["token_embedding.weight"], mask[None]])
    except (OSError, SafetensorError, *_PARSING) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}", remedy="copy the folder again") from error
    state = {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": v for name, v in weights.items()}
    state |= extra
    counters = "num_batches_tracked"
    wrong = next((n for n, value in state.items() if not value.is_floating_point() and not n.endswith(counters)), "")
    if wrong:
        raise ModelError(f"{wrong} of the weights in {folder} is not of floats", remedy="copy the folder again")
    return state


def _load_foreign(path: Path, device: str | torch.device, option: str) -> PretrainedModel:
    try:
        foreign = load_foreign(path)
    except DeclipError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path} is not a model that declip can read: {' '.join(str(error).split()):.300}",
            remedy=f"{option} takes {_TAKEN}",
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
