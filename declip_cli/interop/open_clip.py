"""Checkpoints of OpenCLIP, OpenAI and the original DeCLIP: read safely, in our modules."""

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.files import parse_json
from declip_cli.interop.original import from_original
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing, read_preprocessing
from declip_cli.model.shapes import Untraced, check_heads, infer_architecture

_DAMAGED = "copy the model again"
_SAFER = "where you trust it, save its weights alone: safetensors.torch.save_file(model.state_dict(), FILE)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """A model of another project, in our modules."""

    encoder: DualEncoder
    project: str
    method: str
    preprocessing: Preprocessing


def load_foreign(path: Path) -> ForeignModel:
    """Read a checkpoint of OpenCLIP, OpenAI (state dict) or the original DeCLIP code; nothing in it is executed.

    Args:
        path: a checkpoint file, or a folder with OpenCLIP's two files.

    Returns:
        The model, its architecture read off the shapes.

    Raises:
        ModelError: it cannot be opened safely, or its parameters are not those of a CLIP model.
    """
    config = {}
    if path.is_dir():
        config = _read_open_clip_config(path / "open_clip_config.json")
        path = path / "open_clip_model.safetensors"
    state: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, not parameters by name", remedy=_SAFER)
    state = {str(name).removeprefix("module."): v for name, v in state.items() if isinstance(v, Tensor)}
    if any(name.startswith(("encode_text.", "text_encoder.")) for name in state):
        return _from_original_checkpoint(state)
    if "token_embedding.weight" not in state:
        raise ModelError(
            f"{path} holds no CLIP text tower (parameters such as {', '.join(list(state)[:3])})",
            remedy="checkpoints of OpenCLIP (class CLIP) and of the original DeCLIP code are read",
        )
    return _from_open_clip(state, config)


def _read_open_clip_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes())
        if not isinstance(config["model_cfg"], dict) or not isinstance(config.get("preprocess_cfg", {}), dict):
            raise TypeError("model_cfg and preprocess_cfg are objects")
        return dict(config)
    except OSError as error:
        raise ModelError(f"{path.parent} holds no model: no {path.name}", remedy="check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}", remedy="copy the folder again") from error


def _unpickle(path: Path) -> Any:  # noqa: ANN401  (a checkpoint holds anything)
    """Read a checkpoint of PyTorch with its restricted reader, which knows tensors and plain containers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they ask the user to report the file to PyTorch
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", remedy="check the path") from error
    except Exception as error:  # its words advise to open the file unsafely, so they are not repeated
        with path.open("rb") as file:
            start = file.read(2)
        if "TorchScript" in str(error):
            what = "is a TorchScript archive, which holds code"
        elif isinstance(error, pickle.UnpicklingError) and start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            what = "holds Python objects beside tensors"
        else:
            raise ModelError(
                f"{path} is not a model that declip can read: no checkpoint, or a damaged one",
                remedy="check the path, or copy the file again",
            ) from error
        raise ModelError(f"{path} {what}; it is not opened, since that could run code", remedy=_SAFER) from error


def _from_original_checkpoint(state: dict[str, Tensor]) -> ForeignModel:
    ours = from_original(state)
    ours = {name.removeprefix("encoder."): v for name, v in ours.items() if name.startswith("encoder.")}
    has_tokens = "token_wise.image_mapping.weight" in ours
    architecture = infer_architecture(ours, Untraced())
    encoder = DualEncoder(architecture, token_wise_dim=TOKEN_WISE_DIM if has_tokens else 0)
    encoder.load_state_dict(ours)
    is_filip = has_tokens and not any(name.startswith("projector.") for name in state)
    method = "filip" if is_filip else "declip"
    side = architecture.image_side_px
    resize_px = round(side * 256 / 224) if side >= 128 else side  # ONECROP, P/data/imagenet_dataloader.py
    preprocessing = Preprocessing(image_side_px=side, resize_px=resize_px)
    return ForeignModel(encoder=encoder, project="original", method=method, preprocessing=preprocessing)


def _from_open_clip(state: dict[str, Tensor], config: dict[str, Any]) -> ForeignModel:
    names = {n: n if n.startswith(("visual.", "logit_scale")) else f"text.{n}" for n in state}
    ignored = ("attn_mask", "input_resolution", "context_length", "vocab_size", "logit_bias")
    ours = {names[n]: value.float() for n, value in state.items() if n not in ignored}
    projection = ours.pop("text.text_projection", None)
    if projection is not None:  # OpenAI: a matrix without bias, transposed
        ours["text.text_projection.weight"] = projection.T.contiguous()
    weight = ours["text.text_projection.weight"]
    ours.setdefault("text.text_projection.bias", torch.zeros(len(weight)))
    rows = ours["text.token_embedding.weight"]
    ours["text.token_embedding.weight"] = torch.cat([rows, rows.mean(0, keepdim=True)])
    ours["logit_scale"] = ours["logit_scale"].reshape(())
    given, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    quick_gelu = given.get("quick_gelu", "input_resolution" in state)
    untraced = Untraced(
        vision_heads=_vision_heads(ours, given),
        text_heads=given.get("text_cfg", {}).get("heads"),
        vision_quick_gelu=quick_gelu,
        text_quick_gelu=quick_gelu,
    )
    encoder = DualEncoder(infer_architecture(ours, untraced))
    encoder.load_state_dict(ours)
    side, interpolation = encoder.architecture.image_side_px, preprocess.get("interpolation", "bicubic")
    values = {
        "image_side_px": side,
        "resize_px": side,
        "resize_mode": preprocess.get("resize_mode", "shortest"),
        "interpolation": "bicubic" if interpolation == "random" else interpolation,  # as OpenCLIP takes it
        "mean": preprocess.get("mean", OPENAI_MEAN),
        "std": preprocess.get("std", OPENAI_STD),
    }
    preprocessing = read_preprocessing(values, remedy=_DAMAGED)
    encoder.set_pixels(preprocessing.mean, preprocessing.std)
    return ForeignModel(encoder=encoder, project="open_clip", method="clip", preprocessing=preprocessing)


def _vision_heads(state: dict[str, Tensor], config: dict[str, Any]) -> int | None:
    """Return the heads that OpenCLIP's configuration gives the image tower; None where there is no configuration."""
    if not config:
        return None
    is_vit = "visual.class_embedding" in state
    width = len(state["visual.class_embedding"]) if is_vit else 64 * len(state["visual.conv1.weight"])
    head_width = config.get("vision_cfg", {}).get("head_width", 64)
    if type(head_width) is not int or head_width < 1:
        raise ModelError(f"head_width is a whole number above 0 (got {head_width!r:.60})", remedy=_DAMAGED)
    num_heads = width // head_width
    check_heads(num_heads, width)
    return num_heads
