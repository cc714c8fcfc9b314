"""OpenCLIP's model configurations → our dimensions, or the reason why our towers cannot be those."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from declip_cli.errors import ModelError
from declip_cli.files import parse_json
from declip_cli.model.dims import Architecture, ResNetDims, TextDims, VitDims

_OFF: tuple[Any, ...] = (None, False, 0, "", {})
_FREE_WORDS = """
embed_dim quick_gelu vision_cfg text_cfg custom_text init_logit_scale init_logit_bias cast_dtype output_dict
vision_cfg.layers vision_cfg.width vision_cfg.head_width vision_cfg.mlp_ratio vision_cfg.patch_size
vision_cfg.image_size vision_cfg.no_ln_pre vision_cfg.norm_kwargs vision_cfg.patch_dropout vision_cfg.output_tokens
vision_cfg.attn_pooler_queries vision_cfg.attn_pooler_heads vision_cfg.timm_model_pretrained vision_cfg.timm_pool
vision_cfg.timm_proj vision_cfg.timm_proj_bias vision_cfg.timm_drop vision_cfg.timm_drop_path
text_cfg.context_length text_cfg.width text_cfg.heads text_cfg.layers text_cfg.mlp_ratio text_cfg.norm_kwargs
text_cfg.output_tokens text_cfg.pad_id text_cfg.eos_id text_cfg.proj_bias text_cfg.hf_model_pretrained
text_cfg.hf_proj_type text_cfg.hf_pooler_type
"""
_FREE = frozenset(_FREE_WORDS.split())
"""Fields that our towers follow, and those that change nothing in a plain model's evaluation."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "vision_cfg.pos_embed_type": ("learnable",),
    "vision_cfg.pool_type": ("tok",),
    "vision_cfg.block_type": (None, "default"),
    "text_cfg.block_type": (None, "default"),
    "text_cfg.vocab_size": (49408,),
    "text_cfg.pool_type": ("argmax",),
    "text_cfg.proj_type": ("linear",),
}
"""What the other fields must be; those named neither here nor above must be off."""
_MEANING = {
    "vision_cfg.timm_model_name": "its image tower is one of timm's",
    "text_cfg.hf_model_name": "its text tower is one of Hugging Face's",
    "text_cfg.vocab_size": "its texts have another vocabulary than CLIP's",
    "text_cfg.hf_tokenizer_name": "its texts have another vocabulary than CLIP's",
    "multimodal_cfg": "it is a CoCa model",
    "vision_cfg.pool_type": "its image tower averages patches instead of reading a class token",
    "vision_cfg.attentional_pool": "its image tower pools by attention",
    "vision_cfg.ls_init_value": "its image tower scales its layers (LayerScale)",
}


class OtherTowersError(ModelError):
    """A configuration describes towers that are not CLIP's own."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AGAIN = "copy the file again"


def read_open_clip_model(config: Mapping[str, Any]) -> Architecture:
    """Read the dimensions of a plain ViT or modified ResNet with CLIP's text tower.

    Args:
        config: OpenCLIP's `model_cfg`, from a file that may be damaged.

    Returns:
        The dimensions.

    Raises:
        OtherTowersError: it describes other towers, and says which.
        ModelError: it is damaged.
    """
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ModelError("model_cfg has no vision_cfg or no text_cfg", remedy=_AGAIN)
    _check_plain("", config)
    _check_plain("vision_cfg.", vision)
    _check_plain("text_cfg.", text)
    try:
        quick_gelu = bool(config.get("quick_gelu", False))
        width, heads = _whole(text.get("width", 512)), _whole(text.get("heads", 8))
        side, tower = _vision_dims(vision, quick_gelu)
        return Architecture(
            image_side_px=side,
            embed_dim=_whole(config["embed_dim"]),
            vision=tower,
            text=TextDims(
                context_length=_whole(text.get("context_length", 77)),
                width=width,
                num_layers=_whole(text.get("layers", 12)),
                num_heads=heads,
                mlp_ratio=float(text.get("mlp_ratio", 4.0)),
                norm_eps=_eps(text),
                quick_gelu=quick_gelu,
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model_cfg is damaged: {error}", remedy=_AGAIN) from error


def _vision_dims(vision: Mapping[str, Any], quick_gelu: bool) -> tuple[int, VitDims | ResNetDims]:
    side = vision.get("image_size", 224)
    if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    width, head_width = _whole(vision.get("width", 768)), _whole(vision.get("head_width", 64))
    layers = vision.get("layers", 12)
    if isinstance(layers, list):
        blocks = tuple(_whole(num) for num in layers)
        if len(blocks) != 4:
            raise ValueError(f"a ResNet with {len(blocks)} stages")
        return _whole(side), ResNetDims(num_blocks=blocks, width=width, num_heads=width * 32 // head_width)
    dims = VitDims(
        patch_side_px=_whole(vision.get("patch_size", 16)),
        width=width,
        num_layers=_whole(layers),
        num_heads=width // head_width,
        mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
        norm_eps=_eps(vision),
        quick_gelu=quick_gelu,
        has_pre_norm=not vision.get("no_ln_pre", False),
    )
    return _whole(side), dims


def _check_plain(prefix: str, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if name not in _FREE and value not in _PLAIN.get(name, _OFF):
            meaning = _MEANING.get(name, "declip has no such tower")
            raise OtherTowersError(
                f"this is not a plain ViT or ResNet of CLIP: {meaning} ({name} is {value!r:.60})",
                remedy="use a model whose towers are CLIP's own, such as ViT-B-32, ViT-L-14 or RN50",
            )


def _eps(fields: Mapping[str, Any]) -> float:
    return float((fields.get("norm_kwargs") or {}).get("eps", 1e-5))


def _whole(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r:.60} is not a whole number above 0")
    return value


def read_installed_config(name: str) -> dict[str, Any]:
    """Read a model configuration that comes with the installed OpenCLIP, without importing it.

    Args:
        name: such as `ViT-H-14`.

    Returns:
        Its `model_cfg`.

    Raises:
        ModelError: OpenCLIP is not installed or has no such model.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{name} is a model of OpenCLIP's, which is not installed", remedy="pip install open_clip_torch"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    path = folder / f"{name}.json"
    if not _NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(
            sorted(file.stem for file in folder.glob("*.json") if file.stem.startswith(("ViT", "RN")))[:60]
        )
        raise ModelError(f"OpenCLIP has no model {name!r:.60}", remedy=f"it has {known} …")
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", remedy="install OpenCLIP again") from error
    if not isinstance(config, dict):
        raise ModelError(f"cannot read {path}: not a JSON object", remedy="install OpenCLIP again")
    return config
