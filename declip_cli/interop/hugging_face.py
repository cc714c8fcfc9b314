"""Folders of Hugging Face's `CLIPModel`: their names, configuration and image processor."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import DAMAGED, ForeignModel, translated, with_mask_token
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.preprocessing import OPENAI_MEAN, OPENAI_STD
from declip_cli.model.shapes import Untraced
from declip_cli.model.text_transformer import END_ID

_FILTERS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Pillow's numbers."""
_FIRST_END_IDS = (2, END_ID)
"""With 2, as in configurations before 2023, features are read off at the largest id, which is the end's."""
_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_projection.weight": "text.text_projection.weight",
    "logit_scale": "logit_scale",
}
_IN_LAYERS = {
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
_QUERY = re.compile(r"(.*)\.self_attn\.q_proj\.(weight|bias)")


def read_hugging_face(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    processor: Mapping[str, Any] | None,
    assumptions: Assumptions,
) -> ForeignModel:
    """Translate a `CLIPModel`.

    Args:
        checkpoint: its parameters.
        config: `config.json`; None for a file of weights alone.
        processor: `preprocessor_config.json`, or the part `image_processor` of `processor_config.json`.
        assumptions: decide what none of them says.

    Returns:
        The model.

    Raises:
        ModelError: it is another kind of model, or its images are prepared in a way that declip does not support.
    """
    if config is not None:
        config = _with_old_names(config)
        _check_config(config)
    state = _translate(checkpoint.state)
    vision, text = ((config or {}).get(f"{name}_config") or {} for name in ("vision", "text"))
    usual = "as in OpenAI's models"
    known = None if config is None else _activation(text)
    text_gelu = assumptions.take("activation", known, True, words=f"the activation is QuickGELU, {usual}")
    width = len(state["visual.class_embedding"])
    heads = None if config is None else vision.get("num_attention_heads", 12)
    untraced = Untraced(
        vision_heads=assumptions.take(
            "heads", heads, max(1, width // 64), words=f"attention heads are 64 wide, {usual}"
        ),
        text_heads=assumptions.given.get("text_heads", text.get("num_attention_heads", 8 if config else None)),
        vision_quick_gelu=assumptions.given.get("activation", _activation(vision) if config else text_gelu),
        text_quick_gelu=text_gelu,
        vision_norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
        text_norm_eps=float(text.get("layer_norm_eps", 1e-5)),
    )
    pixels = read_pixels(processor, assumptions)
    found = translated(
        checkpoint, state, untraced, project="huggingface", method="clip", pixels=pixels, assumptions=assumptions
    )
    side = found.architecture.image_side_px
    if "crop" in pixels and pixels["crop"] != side:
        raise ModelError(
            f"its processor makes images of {pixels['crop']} px, its weights are for {side} px", remedy=DAMAGED
        )
    return found


def _with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Let `text_config_dict` and `vision_config_dict` of early configurations win, as transformers does."""
    names = ("text_config", "vision_config")
    old = {name: config[f"{name}_dict"] for name in names if config.get(f"{name}_dict") is not None}
    return dict(config) | old


def _check_config(config: Mapping[str, Any]) -> None:
    kind, text = config.get("model_type"), config.get("text_config") or {}
    if kind != "clip":
        raise ModelError(
            f"it is a model of the type {kind!r:.60}; of Hugging Face's, declip reads the types clip and siglip",
            remedy="use a CLIP model",
        )
    if not isinstance(text, Mapping) or not isinstance(config.get("vision_config") or {}, Mapping):
        raise ModelError("its config.json is damaged: no text_config or vision_config", remedy=DAMAGED)
    end = text.get("eos_token_id", END_ID)
    if end not in _FIRST_END_IDS:
        raise ModelError(
            f"its texts end with the token {end!r:.60}, CLIP's with {END_ID}",
            remedy="use a model with CLIP's tokenizer",
        )


def _activation(tower: Mapping[str, Any]) -> bool:
    """Return whether a tower has QuickGELU."""
    name = tower.get("hidden_act", "quick_gelu")
    if name not in ("quick_gelu", "gelu"):
        raise ModelError(
            f"its activation is {name!r:.60}, which declip does not support",
            remedy="use a model with quick_gelu or gelu",
        )
    return bool(name == "quick_gelu")


def _translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, value in state.items():
        prefix = next((theirs for theirs in _NAMES if name.startswith(theirs)), None)
        if name.endswith(("position_ids", ".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")):
            continue
        if prefix is None:
            if name != "visual_projection.weight":
                ours[name] = value  # refused as no part of ours
            continue
        new = _NAMES[prefix] + name[len(prefix) :]
        for theirs, its in _IN_LAYERS.items():
            new = new.replace(theirs, its)
        query = _QUERY.fullmatch(new)
        if query is not None:
            parts = [state.get(name.replace(".q_proj.", f".{which}_proj.")) for which in "qkv"]
            if any(part is None for part in parts):
                raise ModelError(f"it is not a complete model: {name} without its keys or values", remedy=DAMAGED)
            new, value = f"{query[1]}.attn.in_proj_{query[2]}", torch.cat([part for part in parts if part is not None])
        ours[new] = value
    try:
        ours["visual.proj"] = state["visual_projection.weight"].T.contiguous()
        weight = ours["text.text_projection.weight"]
        ours["text.text_projection.bias"] = weight.new_zeros(len(weight))
        ours["text.token_embedding.weight"] = with_mask_token(ours["text.token_embedding.weight"])
        ours["logit_scale"] = ours["logit_scale"].reshape(())
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"it is not a complete CLIPModel: {error}", remedy=DAMAGED) from error
    return ours


# --- the image processor


def read_pixels(processor: Mapping[str, Any] | None, assumptions: Assumptions) -> dict[str, Any]:
    """Read the image processor; what it leaves out is as `CLIPImageProcessor` has it.

    Source: transformers, models/clip/image_processing_clip.py.
    """
    if processor is None:
        words = "images are prepared as OpenAI's models want it, since there is no preprocessor_config.json"
        mean = assumptions.take("mean", None, OPENAI_MEAN, words=words)
        pixels = {"mean": mean, "std": assumptions.given.get("std", OPENAI_STD)}
        return pixels | {"interpolation": "bicubic", "crop_at": "floor"}
    _check_processor(processor)
    mode, resize_px = _size(processor.get("size", {"shortest_edge": 224}))
    crop: Any = resize_px
    if processor.get("do_center_crop", True):
        crop_size = processor.get("crop_size", 224)
        crop = crop_size.get("height") if isinstance(crop_size, Mapping) else crop_size
    elif mode == "shortest":
        raise ModelError("its processor cuts no square out of its images", remedy="use one with do_center_crop")
    if mode == "squash" and crop != resize_px:
        raise ModelError("its processor squashes images and then crops them", remedy="use one that does either")
    return {
        "mean": processor.get("image_mean", OPENAI_MEAN),
        "std": processor.get("image_std", OPENAI_STD),
        "interpolation": _filter(processor.get("resample", 3)),
        "resize_mode": mode,
        "resize_px": resize_px,
        "crop_at": "floor" if mode == "shortest" else "round",
        "crop": crop,
    }


def _check_processor(processor: Mapping[str, Any]) -> None:
    is_usual = all(processor.get(key, True) for key in ("do_resize", "do_rescale", "do_normalize"))
    factor = processor.get("rescale_factor", 1 / 255)
    if not is_usual or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise ModelError(
            "its processor does not resize, divide by 255 and normalize images", remedy="use one that does all three"
        )


def _size(size: object) -> tuple[str, int]:
    """Return how the processor resizes, and to how many pixels."""
    if isinstance(size, Mapping) and type(size.get("shortest_edge")) is int and "longest_edge" not in size:
        return "shortest", size["shortest_edge"]
    if isinstance(size, Mapping) and type(size.get("height")) is int and size["height"] == size.get("width"):
        return "squash", size["height"]
    if type(size) is int:
        return "shortest", size
    raise ModelError(f"its processor resizes images to {size!r:.80}", remedy="use one with shortest_edge, or a square")


def _filter(resample: object) -> str:
    found = _FILTERS.get(resample) if isinstance(resample, int | str) else None
    if found is None:
        raise ModelError(
            f"its processor resizes with the filter {resample!r:.60}",
            remedy="use one with bilinear (2) or bicubic (3)",
        )
    return found
