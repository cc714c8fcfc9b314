"""Checkpoints of other projects: their parameter names and vocabularies ⇄ ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.model.architectures import Architecture, ResNetDims, TextDims, VitDims
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Of the image towers of OpenCLIP's ViT-H, ViT-g and ViT-bigG, by their width; 64 in all smaller ones."""
_ORIGINAL_MASK_ROW = 49406
"""The original's vocabulary puts the mask token before start and end; ours puts it after them."""
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


def open_clip_config(architecture: Architecture, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
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
    """Read a checkpoint of OpenCLIP, OpenAI (state dict) or the original DeCLIP code.

    Args:
        path: a checkpoint file, or a folder with OpenCLIP's two files.

    Returns:
        The model, its architecture read off the shapes.

    Raises:
        ModelError: the parameters are not those of a CLIP model.
    """
    config = {}
    if path.is_dir():
        config = json.loads((path / "open_clip_config.json").read_text(encoding="utf-8"))
        path = path / "open_clip_model.safetensors"
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)  # type: ignore[assignment]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith(("encode_text.", "text_encoder.")) for name in state):
        return _from_original_checkpoint(state)
    if "token_embedding.weight" not in state:
        raise ModelError(
            f"{path} holds no CLIP text tower (parameters such as {', '.join(list(state)[:3])})",
            remedy="--model takes checkpoints of OpenCLIP (class CLIP) and of the original DeCLIP code",
        )
    return _from_open_clip(state, config)


def _from_original_checkpoint(state: dict[str, Tensor]) -> ForeignModel:
    ours = from_original(state)
    ours = {name.removeprefix("encoder."): v for name, v in ours.items() if name.startswith("encoder.")}
    has_tokens = "token_wise.image_mapping.weight" in ours
    architecture = _infer_architecture(ours, quick_gelu=True)
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
    quick_gelu = bool(config.get("model_cfg", {}).get("quick_gelu", "input_resolution" in state))
    encoder = DualEncoder(_infer_architecture(ours, quick_gelu=quick_gelu, config=config.get("model_cfg", {})))
    encoder.load_state_dict(ours)
    preprocess = config.get("preprocess_cfg", {})
    encoder.pixel_mean.copy_(torch.tensor(preprocess.get("mean", _OPENAI_MEAN)))
    encoder.pixel_std.copy_(torch.tensor(preprocess.get("std", _OPENAI_STD)))
    side = encoder.architecture.image_side_px
    return ForeignModel(
        encoder=encoder,
        project="open_clip",
        method="clip",
        resize_px=side,
        interpolation=preprocess.get("interpolation", "bicubic"),
    )


def _infer_architecture(
    state: dict[str, Tensor], *, quick_gelu: bool, config: dict[str, Any] | None = None
) -> Architecture:
    """Read dimensions off the shapes, and heads, which leave no trace there, off OpenCLIP's configuration."""
    given = config or {}
    vision: VitDims | ResNetDims
    if "visual.proj" in state:
        width, embed_dim = state["visual.proj"].shape
        patch = state["visual.conv1.weight"].shape[-1]
        side = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        layers = _count(state, "visual.transformer.resblocks.")
        head_width = given.get("vision_cfg", {}).get("head_width", 64 if given else _HEAD_WIDTHS.get(width, 64))
        vision = VitDims(patch_side_px=patch, width=width, num_layers=layers, num_heads=max(1, width // head_width))
    else:
        embed_dim = len(state["visual.attnpool.c_proj.weight"])
        side = 32 * round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        blocks = tuple(_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        width = 2 * len(state["visual.conv1.weight"])
        head_width = given.get("vision_cfg", {}).get("head_width", 64)
        vision = ResNetDims(num_blocks=blocks, width=width, num_heads=max(1, width * 32 // head_width))
    text_width = state["text.positional_embedding"].shape[1]
    text = TextDims(
        context_length=len(state["text.positional_embedding"]),
        width=text_width,
        num_layers=_count(state, "text.transformer.resblocks."),
        num_heads=given.get("text_cfg", {}).get("heads", max(1, text_width // 64)),
    )
    return Architecture(image_side_px=side, embed_dim=embed_dim, vision=vision, text=text, quick_gelu=quick_gelu)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
