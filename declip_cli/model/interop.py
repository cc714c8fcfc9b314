"""Checkpoints of other projects: their parameter names and vocabularies ⇄ ours."""

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.files import parse_json
from declip_cli.model.architectures import Architecture, VitDims
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.shapes import infer_architecture

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_ORIGINAL_MASK_ROW = 49406
"""The original's vocabulary puts the mask token before start and end; ours puts it after them."""
_DAMAGED = "copy the model again"
_SAFER = "where you trust it, save its weights alone: safetensors.torch.save_file(model.state_dict(), FILE)"
_UNUSED: tuple[str, ...] = ("visual.fc.", "predictor_sim.bn3.", "projector_text.", "predictor_text.")
_UNUSED += ("projector_nn_text.", "predictor_nn_text.")
_RENAMED = {
    "encode_text.": "encoder.text.",
    "text_encoder.": "encoder.text.",
    "visual.": "encoder.visual.",
    "image_mapping.": "encoder.token_wise.image_mapping.",
    "text_mapping.": "encoder.token_wise.text_mapping.",
    "text_label_predictor.": "mask_head.",
    "predictor_sim.": "simclr_head.",
}


def rename_original(name: str) -> str:
    """Translate a parameter name of the original DeCLIP code.

    Args:
        name: such as `module.encode_text.ln_final.weight`.

    Returns:
        The name in a method's state dict; empty for parameters the original allocates but never uses.

    Source: Sense-GVT/DeCLIP, prototype/model/*.py.
    """
    name = name.removeprefix("module.")
    if name.startswith(_UNUSED):
        return ""
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return "encoder.logit_scale" if name == "logit_scale" else name


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the original DeCLIP code into a method's.

    Args:
        state: parameters by name, with or without the prefix `module.`.

    Returns:
        Parameters of the method, with the vocabulary in our order.
    """
    ours = {}
    for name, value in state.items():
        new_name = rename_original(name)
        if not new_name:
            continue
        if new_name in ("encoder.text.token_embedding.weight", "mask_head.weight", "mask_head.bias"):
            value = _move_mask_row_last(value)
        if new_name == "encoder.logit_scale":
            value = value.reshape(())
        ours[new_name] = value
    return ours


def _move_mask_row_last(rows: Tensor) -> Tensor:
    before, mask, after = rows.split([_ORIGINAL_MASK_ROW, 1, len(rows) - _ORIGINAL_MASK_ROW - 1])
    return torch.cat([before, after, mask])


def original_ids(ids: Tensor) -> Tensor:
    """Translate token ids of the original's vocabulary into ours; -100 and ordinary ids stay.

    Args:
        ids: int64, any shape.

    Returns:
        Our ids, same shape.
    """
    moved = torch.where(ids > _ORIGINAL_MASK_ROW, ids - 1, ids)
    return torch.where(ids == _ORIGINAL_MASK_ROW, ids.new_tensor(49408), moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """A model of another project, in our modules."""

    encoder: DualEncoder
    project: str
    method: str
    resize_px: int
    interpolation: str = "bilinear"


def open_clip_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split an encoder's state dict into OpenCLIP's and what OpenCLIP has no place for.

    Args:
        state: of a `DualEncoder`.

    Returns:
        Parameters under OpenCLIP's names, without the mask token; the mask token's embedding and our heads.
    """
    weights = {name.removeprefix("text."): v for name, v in state.items() if not name.startswith("token_wise.")}
    extra = {name: value for name, value in state.items() if name.startswith("token_wise.")}
    rows = weights["token_embedding.weight"]
    weights["token_embedding.weight"] = rows[:-1].contiguous()
    return weights, extra | {"mask_embedding": rows[-1].clone()}


def open_clip_config(architecture: Architecture, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Describe an architecture in OpenCLIP's words.

    Args:
        architecture: the dimensions.
        mean: of the pixels, in [0, 1].
        std: of the pixels, in [0, 1].

    Returns:
        The content of `open_clip_config.json`.
    """
    dims, text = architecture.vision, architecture.text
    vision: dict[str, Any] = {"image_size": architecture.image_side_px, "width": dims.width}
    if isinstance(dims, VitDims):
        vision |= {"layers": dims.num_layers, "patch_size": dims.patch_side_px}
        vision["head_width"] = dims.width // dims.num_heads
    else:
        vision |= {"layers": list(dims.num_blocks), "head_width": dims.width * 32 // dims.num_heads}
    text_config = {
        "context_length": text.context_length,
        "vocab_size": 49408,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.num_layers,
        "proj_bias": True,
    }
    model = {"embed_dim": architecture.embed_dim, "quick_gelu": architecture.quick_gelu}
    return {
        "model_cfg": model | {"vision_cfg": vision, "text_cfg": text_config},
        "preprocess_cfg": {
            "size": architecture.image_side_px,
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


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
    architecture = infer_architecture(ours, quick_gelu=True)
    encoder = DualEncoder(architecture, token_wise_dim=TOKEN_WISE_DIM if has_tokens else 0)
    encoder.load_state_dict(ours)
    is_filip = has_tokens and not any(name.startswith("projector.") for name in state)
    method = "filip" if is_filip else "declip"
    return ForeignModel(encoder=encoder, project="original", method=method, resize_px=256)


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
    if not isinstance(quick_gelu, bool):
        raise ModelError(f"quick_gelu is true or false (got {quick_gelu!r})", remedy=_DAMAGED)
    encoder = DualEncoder(infer_architecture(ours, quick_gelu=quick_gelu, config=given))
    encoder.load_state_dict(ours)
    set_pixels(encoder, preprocess.get("mean", _OPENAI_MEAN), preprocess.get("std", _OPENAI_STD))
    interpolation = preprocess.get("interpolation", "bicubic")
    if interpolation not in ("bilinear", "bicubic", "random"):
        raise ModelError(f"interpolation is bilinear, bicubic or random (got {interpolation!r})", remedy=_DAMAGED)
    return ForeignModel(
        encoder=encoder,
        project="open_clip",
        method="clip",
        resize_px=encoder.architecture.image_side_px,
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",  # as OpenCLIP takes it
    )


def set_pixels(encoder: DualEncoder, mean: object, std: object) -> None:
    """Let an encoder normalise pixels by the mean and the deviation of each channel that a file gives.

    Raises:
        ModelError: they are not three numbers each, the deviations above 0.
    """
    for what, values, buffer in (("mean", mean, encoder.pixel_mean), ("std", std, encoder.pixel_std)):
        is_right = (
            isinstance(values, list | tuple) and len(values) == 3 and all(type(v) in (int, float) for v in values)
        )
        given = torch.tensor(values if is_right else [torch.nan] * 3)
        if not given.isfinite().all() or (what == "std" and given.min() <= 0):
            raise ModelError(f"{what} of the pixels is no list of three numbers (got {values!r:.60})", remedy=_DAMAGED)
        buffer.copy_(given)
