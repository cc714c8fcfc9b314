"""A model folder: safetensors and metadata, written whole, read strictly; OpenCLIP reads it too where it can."""

import hashlib
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
from declip_cli.errors import ModelError
from declip_cli.files import SUMS_FILE, check_folder, existing_folder, new_folder, read_json, write_json
from declip_cli.model.clip import DualEncoder, Encoder, WholeTokenizer
from declip_cli.model.dims import Architecture, describe_architecture, read_architecture
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.open_clip_layout import open_clip_config, open_clip_state, why_not_open_clip
from declip_cli.model.preprocessing import Preprocessing, read_preprocessing
from declip_cli.model.shapes import Untraced, infer_architecture

WEIGHTS_FILE = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
OWN_CONFIG_FILE = "declip.json"
EXTRA_FILE = "declip_extra.safetensors"
"""What OpenCLIP has no place for: the mask token's embedding and the token-wise heads."""
FORMAT = 1
_AGAIN = "copy the folder again"
_LATER = ("mlp_ratio", "norm_eps", "quick_gelu", "has_pre_norm")
"""Dimensions that folders of earlier versions do not name; what they leave out is as in CLIP."""
PARSING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError)
"""What reading damaged configurations and weights may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedModel:
    """A dual encoder with all that is needed to use it as it was trained."""

    encoder: Encoder
    name: str
    """Where it came from."""
    method: str
    arch: str
    token_wise: bool
    """Whether images and texts are compared token by token (FILIP)."""
    preprocessing: Preprocessing
    context_length: int
    fingerprint: str
    """sha256 of weights and preprocessing; empty for a model that is still being trained."""
    tokenizer: WholeTokenizer | None = None
    """None for CLIP's vocabulary and a causal tower, which reads texts of any length up to the context."""

    @property
    def towers(self) -> DualEncoder:
        """The encoder where its towers are CLIP's own, else ModelError."""
        if isinstance(self.encoder, DualEncoder):
            return self.encoder
        what = f"the towers of {self.name} are not CLIP's own: it can be evaluated, but neither trained nor exported"
        raise ModelError(what, remedy="use a model such as ViT-B-32, ViT-L-14 or RN50")

    @property
    def image_side_px(self) -> int:
        """Side of the square that the model sees."""
        return self.preprocessing.image_side_px

    @property
    def device(self) -> torch.device:
        """Where the encoder lies."""
        return next(self.encoder.parameters()).device


def trained_preprocessing(encoder: DualEncoder, config: ModelConfig) -> Preprocessing:
    """Return how images are prepared for a model that is trained here.

    Without other settings the shorter side is resized to the side of the image, as OpenCLIP does it, so that the
    folder scores the same there. The original resizes to 256 for 224 (Sense-GVT/DeCLIP,
    prototype/data/imagenet_dataloader.py, ONECROP).

    Raises:
        ModelError: images would be smaller than the image.
    """
    side = encoder.architecture.image_side_px
    values = {
        "image_side_px": side,
        "resize_px": config.resize_px or side,
        "resize_mode": config.resize_mode or "shortest",
        "interpolation": config.interpolation or "bilinear",
        "mean": _digits(encoder.pixel_mean),
        "std": _digits(encoder.pixel_std),
    }
    return read_preprocessing(values, remedy=f"--set model.resize_px={side}")


def save_model(
    encoder: DualEncoder, folder: Path, *, config: ModelConfig, method: str, preprocessing: Preprocessing | None = None
) -> None:
    """Write a model folder that `load_model` reads, and OpenCLIP (`local-dir:`) where it can express the model.

    Args:
        encoder: the model, on any device.
        folder: appears whole, with the digests of its files, in place of an earlier one.
        config: how the encoder was built.
        method: name of the method that trained it.
        preprocessing: of images; None: as `trained_preprocessing` has it.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    weights, extra = open_clip_state(state)
    preprocessing = preprocessing or trained_preprocessing(encoder, config)
    own = {
        "format": FORMAT,
        "declip_version": __version__,
        "method": method,
        "token_wise": method == "filip",
        "has_token_wise_heads": encoder.token_wise is not None,
        "arch": config.arch,
        "architecture": describe_architecture(encoder.architecture),
        "preprocessing": preprocessing.to_json(),
        "tokenizer": {"vocabulary": "clip-bpe", "context_length": encoder.architecture.text.context_length},
    }
    with new_folder(folder) as new:
        save_file(weights, new / WEIGHTS_FILE)
        save_file(extra, new / EXTRA_FILE)
        if not why_not_open_clip(encoder.architecture, preprocessing):
            there = open_clip_config(encoder.architecture, preprocessing, has_logit_bias="logit_bias" in state)
            write_json(new / OPEN_CLIP_CONFIG_FILE, there)
        write_json(new / OWN_CONFIG_FILE, own)


def _digits(values: Tensor) -> list[float]:
    """Write float32 values with as few decimal digits as give them back."""
    return [float(str(value)) for value in values.float().cpu().numpy()]


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


def find_folder(path: Path) -> Path | None:
    """Find the model folder of ours at a path: the folder itself, or `model/` of a run folder; None where none is."""
    if path.is_file():
        return None
    inner = existing_folder(path / "model")
    folder = inner if inner.is_dir() else existing_folder(path)
    is_own = (folder / OWN_CONFIG_FILE).is_file() or OWN_CONFIG_FILE.encode() in _sums(folder)
    return folder if is_own else None


def read_model(folder: Path, *, name: str) -> PretrainedModel:
    """Read a model folder of ours.

    Args:
        folder: from `find_folder`.
        name: what to call the model.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ModelError: it is incomplete, damaged or contradicts itself.
    """
    own, open_clip, state, fingerprint = _read_folder(folder)
    try:
        architecture, preprocessing = _check_own(own, open_clip, state)
        encoder = DualEncoder(architecture, token_wise_dim=TOKEN_WISE_DIM if own["has_token_wise_heads"] else 0)
        encoder.load_state_dict(state)
        encoder.set_pixels(preprocessing.mean, preprocessing.std)
    except (ModelError, *PARSING_ERRORS) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(f"the model in {folder} is damaged: {reason}", remedy=_AGAIN) from error
    return PretrainedModel(
        encoder=encoder.eval(),
        name=name,
        method=own["method"],
        arch=own["arch"],
        token_wise=own["token_wise"],
        preprocessing=preprocessing,
        context_length=architecture.text.context_length,
        fingerprint=fingerprint,
    )


def describe_folder(folder: Path) -> tuple[dict[str, Any], Architecture, Preprocessing]:
    """Read what a model folder says of itself, without its weights; `read_model` checks whether that is true.

    Raises:
        ModelError: it is damaged.
    """
    own = _read_own_config(folder)
    try:
        return own, read_architecture(own["architecture"]), read_preprocessing(own["preprocessing"], remedy=_AGAIN)
    except PARSING_ERRORS as error:
        raise ModelError(f"the model in {folder} is damaged: {error}", remedy=_AGAIN) from error


def _check_own(
    own: dict[str, Any], open_clip: dict[str, Any] | None, state: dict[str, Tensor]
) -> tuple[Architecture, Preprocessing]:
    """Read the architecture off the weights; whatever the two configurations say must agree with it.

    Raises:
        ModelError: they contradict each other.
        KeyError, TypeError, …: one of `PARSING_ERRORS`: something is missing or of another kind.
    """
    given, preprocessing = own["architecture"], read_preprocessing(own["preprocessing"], remedy=_AGAIN)
    vision, text = given["vision"], given["text"]
    old = given.get("quick_gelu", True)  # of both towers, in folders of earlier versions
    untraced = Untraced(
        vision_heads=vision["num_heads"],
        text_heads=text["num_heads"],
        vision_quick_gelu=vision.get("quick_gelu", old),
        text_quick_gelu=text.get("quick_gelu", old),
        vision_norm_eps=vision.get("norm_eps", 1e-5),
        text_norm_eps=text.get("norm_eps", 1e-5),
    )
    found = infer_architecture(state, untraced)
    has_heads = any(name.startswith("token_wise.") for name in state)
    described = describe_architecture(found)
    for tower in ("vision", "text"):  # an earlier version does not say all
        described[tower] = {k: v for k, v in described[tower].items() if k in given[tower] or k not in _LATER}
    wanted = {
        "architecture": described,
        "has_token_wise_heads": has_heads,
        "token_wise": bool(own["token_wise"]) and has_heads,
        "method": own["method"] if own["method"] in get_args(MethodName) else "one of the methods there are",
        "arch": str(own["arch"]),
        "preprocessing": {"image_side_px": found.image_side_px},
        "tokenizer": {"vocabulary": "clip-bpe", "context_length": found.text.context_length},
    }
    _compare(wanted, own, OWN_CONFIG_FILE, "the weights")
    # Earlier versions wrote OpenCLIP's configuration though they resized to 256 px themselves.
    as_there = preprocessing if open_clip is None else replace(preprocessing, resize_px=found.image_side_px)
    is_expected = not why_not_open_clip(found, as_there)
    if is_expected != (open_clip is not None):
        problem = "missing" if is_expected else "there, but cannot express the model"
        raise ModelError(f"{OPEN_CLIP_CONFIG_FILE} is {problem}", remedy=_AGAIN)
    there = open_clip_config(found, as_there, has_logit_bias="logit_bias" in state) if is_expected else None
    _compare(there, open_clip, OPEN_CLIP_CONFIG_FILE, OWN_CONFIG_FILE)
    return found, preprocessing


def _compare(wanted: Any, given: Any, file: str, other: str, field: str = "") -> None:  # noqa: ANN401  (JSON)
    """Raise ModelError for the first field in which a configuration file and what it should say differ."""
    if isinstance(wanted, dict) and isinstance(given, dict):
        for name, value in wanted.items():
            _compare(value, given.get(name), file, other, f"{field}.{name}".removeprefix("."))
        return
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if wanted != given or isinstance(wanted, bool) != isinstance(given, bool):
        raise ModelError(f"{field} is {given!r:.60} in {file}, by {other} {wanted!r:.60}", remedy=_AGAIN)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Tensor], str]:
    """Read both configurations, weights and fingerprint; once more where a run replaced the folder meanwhile."""
    for is_last_try in (False, False, True):
        before = _sums(folder)
        try:
            if before:
                check_folder(folder)
            own, state = _read_own_config(folder), _read_state(folder)
            path = folder / OPEN_CLIP_CONFIG_FILE
            open_clip = _read_config(path) if path.exists() else None
            fingerprint = fingerprint_of(folder / WEIGHTS_FILE, folder / EXTRA_FILE, folder / OWN_CONFIG_FILE)
            if _sums(folder) == before:
                return own, open_clip, state, fingerprint
        except (OSError, ValueError, ModelError) as error:
            if is_last_try or _sums(folder) == before:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(f"the model in {folder} is damaged: {error}", remedy=_AGAIN) from error
    raise ModelError(f"the model in {folder} changes while it is read", remedy="try again in a moment")


def _sums(folder: Path) -> bytes:
    """Read the list of digests; empty for a folder that another version or tool has written."""
    try:
        return (folder / SUMS_FILE).read_bytes()
    except OSError:
        return b""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", remedy=_AGAIN) from error
    if not isinstance(config, dict):
        raise ModelError(f"cannot read {path}: not a JSON object", remedy=_AGAIN)
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
    except (OSError, SafetensorError, *PARSING_ERRORS) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}", remedy=_AGAIN) from error
    state = {name if name.startswith(("visual.", "logit_")) else f"text.{name}": v for name, v in weights.items()}
    state |= extra
    counters = "num_batches_tracked"
    wrong = next((n for n, value in state.items() if not value.is_floating_point() and not n.endswith(counters)), "")
    if wrong:
        raise ModelError(f"{wrong} of the weights in {folder} is not of floats", remedy=_AGAIN)
    return state


def fingerprint_of(*paths: Path) -> str:
    """Return the sha256 of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
