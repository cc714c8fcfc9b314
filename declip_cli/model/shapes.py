"""Read an architecture off the shapes of its parameters, whoever wrote them and however damaged they are."""

import math
from dataclasses import dataclass

from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.model.dims import Architecture, ResNetDims, TextDims, VitDims
from declip_cli.model.text_transformer import VOCABULARY_SIZE

_DAMAGED = "copy the model again"
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Of the image towers of OpenCLIP's ViT-H, ViT-g and ViT-bigG, by their width; 64 in all smaller ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Untraced:
    """What leaves no trace in the shapes of parameters."""

    vision_heads: int | None = None
    """None: 64 wide, as in all published models but the very large."""
    text_heads: int | None = None
    """None: 64 wide."""
    vision_quick_gelu: bool = True
    text_quick_gelu: bool = True
    vision_norm_eps: float = 1e-5
    text_norm_eps: float = 1e-5


def infer_architecture(state: dict[str, Tensor], untraced: Untraced) -> Architecture:
    """Read dimensions off the shapes of an encoder's parameters.

    Args:
        state: of a `DualEncoder`; tensors without storage (`meta`) do, too.
        untraced: the rest, from elsewhere.

    Returns:
        An architecture whose parameters take no more memory than a small multiple of `state`.

    Raises:
        KeyError: a parameter is missing.
        ModelError: the shapes contradict each other, or what is given besides cannot be.
    """
    side, vision = _vision_dims(state, untraced)
    width = state["text.positional_embedding"].shape[1]
    text = TextDims(
        context_length=len(state["text.positional_embedding"]),
        width=width,
        num_layers=_count(state, "text.transformer.resblocks."),
        num_heads=max(1, width // 64) if untraced.text_heads is None else untraced.text_heads,
        mlp_ratio=_mlp_ratio(state, "text.", width),
        norm_eps=_checked_eps(untraced.text_norm_eps),
        quick_gelu=_checked_switch(untraced.text_quick_gelu),
    )
    check_heads(text.num_heads, width)
    embed_dim = len(state["text.text_projection.weight"])
    _check_memory(vision, text, embed_dim, num_given=sum(value.numel() for value in state.values()))
    return Architecture(image_side_px=side, embed_dim=embed_dim, vision=vision, text=text)


def _vision_dims(state: dict[str, Tensor], untraced: Untraced) -> tuple[int, VitDims | ResNetDims]:
    """Return the side of the images and the dimensions of their tower."""
    heads = untraced.vision_heads
    if "visual.class_embedding" not in state and "visual.proj" not in state:
        blocks = tuple(_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        width = 2 * len(state["visual.conv1.weight"])
        heads = max(1, width * 32 // 64) if heads is None else heads
        check_heads(heads, width * 32)
        side = 32 * round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        return side, ResNetDims(num_blocks=blocks, width=width, num_heads=heads)
    width = len(state["visual.class_embedding"])
    patch = state["visual.conv1.weight"].shape[-1]
    heads = max(1, width // _HEAD_WIDTHS.get(width, 64)) if heads is None else heads
    check_heads(heads, width)
    dims = VitDims(
        patch_side_px=patch,
        width=width,
        num_layers=_count(state, "visual.transformer.resblocks."),
        num_heads=heads,
        mlp_ratio=_mlp_ratio(state, "visual.", width),
        norm_eps=_checked_eps(untraced.vision_norm_eps),
        quick_gelu=_checked_switch(untraced.vision_quick_gelu),
        has_pre_norm="visual.ln_pre.weight" in state,
    )
    return patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5), dims


def _mlp_ratio(state: dict[str, Tensor], prefix: str, width: int) -> float:
    """Return a ratio whose product with the width, cut to a whole number, is the width of the hidden layers."""
    hidden = len(state[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"])
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _checked_eps(value: object) -> float:
    if not isinstance(value, float) or not 0 < value < 0.1:
        raise ModelError(f"{value!r:.60} is not a valid epsilon of a layer norm", remedy=_DAMAGED)
    return value


def _checked_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ModelError(f"quick_gelu is true or false (got {value!r:.60})", remedy=_DAMAGED)
    return value


def check_heads(num_heads: object, width: int) -> None:
    """Raise ModelError unless a number of heads, from a file, divides a width."""
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise ModelError(f"a width of {width} cannot be divided among {num_heads!r:.60} heads", remedy=_DAMAGED)


def _check_memory(vision: VitDims | ResNetDims, text: TextDims, embed_dim: int, *, num_given: int) -> None:
    """Refuse dimensions that need many more numbers than the file holds, before memory is taken for them."""
    if isinstance(vision, VitDims):
        num_needed = vision.width * (_per_layer(vision) * vision.num_layers + 3 * vision.patch_side_px**2 + embed_dim)
    else:
        widths = (vision.width << stage for stage in range(4))
        num_needed = 32 * vision.width * (3 * 32 * vision.width + embed_dim)
        num_needed += sum(17 * width**2 * num for width, num in zip(widths, vision.num_blocks, strict=True))
    num_needed += text.width * (_per_layer(text) * text.num_layers + VOCABULARY_SIZE)
    if num_needed > num_given:
        raise ModelError(
            f"the parameters contradict each other: {vision} and {text} need {num_needed:,} numbers or more, "
            f"there are {num_given:,}",
            remedy=_DAMAGED,
        )


def _per_layer(dims: VitDims | TextDims) -> int:
    """Count the matrices' numbers in a block, in widths."""
    return 4 * dims.width + 2 * dims.mlp_width


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
