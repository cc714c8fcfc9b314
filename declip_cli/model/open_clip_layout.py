"""Our encoder in OpenCLIP's words: parameter names and `open_clip_config.json`, which our model folder holds too."""

from typing import Any

from torch import Tensor

from declip_cli.model.dims import Architecture, VitDims
from declip_cli.model.preprocessing import Preprocessing

VOCABULARY_SIZE = 49408
"""OpenAI's; our mask token comes after it."""


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


def why_not_open_clip(architecture: Architecture, preprocessing: Preprocessing) -> str:
    """Say what of a model OpenCLIP's configuration cannot express, so that it would compute something else.

    Args:
        architecture: the dimensions.
        preprocessing: of the images.

    Returns:
        A clause; empty where OpenCLIP can express all of it.
    """
    vision, text, side = architecture.vision, architecture.text, preprocessing.image_side_px
    if isinstance(vision, VitDims) and vision.quick_gelu != text.quick_gelu:
        return "its towers have different activations (QuickGELU and GELU)"
    if preprocessing.crop_at != "round" and preprocessing.resize_mode == "shortest":
        return "the crop of an image starts at half an odd margin rounded down, as in Hugging Face's processors"
    if preprocessing.resize_px != side:
        return f"images are resized to {preprocessing.resize_px} px before the {side} px in their middle are cut out"
    return ""


def open_clip_config(
    architecture: Architecture, preprocessing: Preprocessing, *, has_logit_bias: bool = False
) -> dict[str, Any]:
    """Describe a model that OpenCLIP can express in its words.

    Args:
        architecture: the dimensions.
        preprocessing: of the images.
        has_logit_bias: it was trained by the sigmoid loss.

    Returns:
        The content of `open_clip_config.json`.
    """
    dims, text = architecture.vision, architecture.text
    vision: dict[str, Any] = {"image_size": architecture.image_side_px, "width": dims.width}
    if isinstance(dims, VitDims):
        vision |= {"layers": dims.num_layers, "patch_size": dims.patch_side_px}
        vision["head_width"] = dims.width // dims.num_heads
        vision |= _unusual(dims.mlp_ratio, dims.norm_eps) | ({} if dims.has_pre_norm else {"no_ln_pre": True})
    else:
        vision |= {"layers": list(dims.num_blocks), "head_width": dims.width * 32 // dims.num_heads}
    text_config = {
        "context_length": text.context_length,
        "vocab_size": VOCABULARY_SIZE,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.num_layers,
        "proj_bias": True,
    }
    text_config |= _unusual(text.mlp_ratio, text.norm_eps)
    model: dict[str, Any] = {"embed_dim": architecture.embed_dim, "quick_gelu": text.quick_gelu}
    model |= {"init_logit_bias": -10.0} if has_logit_bias else {}  # makes the parameter; the weights set it
    return {
        "model_cfg": model | {"vision_cfg": vision, "text_cfg": text_config},
        "preprocess_cfg": {
            "size": preprocessing.image_side_px,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "resize_mode": preprocessing.resize_mode,
        },
    }


def _unusual(mlp_ratio: float, norm_eps: float) -> dict[str, Any]:
    found: dict[str, Any] = {} if mlp_ratio == 4 else {"mlp_ratio": mlp_ratio}
    return found if norm_eps == 1e-5 else found | {"norm_kwargs": {"eps": norm_eps}}
