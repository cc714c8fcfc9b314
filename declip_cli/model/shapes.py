"""Read an architecture off the shapes of its parameters, whoever wrote them and however damaged they are."""

from typing import Any

from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.model.architectures import Architecture, ResNetDims, TextDims, VitDims
from declip_cli.model.text_transformer import VOCABULARY_SIZE

_DAMAGED = "copy the model again"
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Of the image towers of OpenCLIP's ViT-H, ViT-g and ViT-bigG, by their width; 64 in all smaller ones."""


def infer_architecture(
    state: dict[str, Tensor], *, quick_gelu: bool, config: dict[str, Any] | None = None
) -> Architecture:
    """Read dimensions off the shapes of an encoder's parameters.

    Args:
        state: of a `DualEncoder`.
        quick_gelu: leaves no trace in the shapes.
        config: OpenCLIP's `model_cfg`; heads, which leave no trace either, are taken from there, else 64 wide.

    Returns:
        An architecture whose parameters take no more memory than a small multiple of `state`.

    Raises:
        KeyError: a parameter is missing.
        ModelError: the shapes contradict each other, or the heads do not divide a width.
    """
    given = config or {}
    vision: VitDims | ResNetDims
    embed_dim = len(state["text.text_projection.weight"])
    head_width = given.get("vision_cfg", {}).get("head_width")
    if "visual.class_embedding" in state or "visual.proj" in state:
        width = len(state["visual.class_embedding"])
        patch = state["visual.conv1.weight"].shape[-1]
        side = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        layers = _count(state, "visual.transformer.resblocks.")
        heads = _num_heads(width, head_width, usual=64 if given else _HEAD_WIDTHS.get(width, 64))
        vision = VitDims(patch_side_px=patch, width=width, num_layers=layers, num_heads=heads)
    else:
        side = 32 * round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        blocks = tuple(_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        width = 2 * len(state["visual.conv1.weight"])
        vision = ResNetDims(num_blocks=blocks, width=width, num_heads=_num_heads(width * 32, head_width))
    text_width = state["text.positional_embedding"].shape[1]
    text_heads = given.get("text_cfg", {}).get("heads")
    text = TextDims(
        context_length=len(state["text.positional_embedding"]),
        width=text_width,
        num_layers=_count(state, "text.transformer.resblocks."),
        num_heads=_num_heads(text_width) if text_heads is None else text_heads,
    )
    check_heads(text.num_heads, text_width)
    _check_memory(vision, text, embed_dim, num_given=sum(value.numel() for value in state.values()))
    return Architecture(image_side_px=side, embed_dim=embed_dim, vision=vision, text=text, quick_gelu=quick_gelu)


def _num_heads(width: int, head_width: object = None, *, usual: int = 64) -> int:
    if head_width is None:
        return max(1, width // usual)
    num_heads = width // head_width if type(head_width) is int and head_width > 0 else 0
    check_heads(num_heads, width)
    return num_heads


def check_heads(num_heads: object, width: int) -> None:
    """Raise ModelError unless a number of heads, from a file, divides a width."""
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise ModelError(f"a width of {width} cannot be divided among {num_heads!r:.60} heads", remedy=_DAMAGED)


def _check_memory(vision: VitDims | ResNetDims, text: TextDims, embed_dim: int, *, num_given: int) -> None:
    """Refuse dimensions that need many more numbers than the file holds, before memory is taken for them."""
    if isinstance(vision, VitDims):
        num_needed = vision.width * (12 * vision.width * vision.num_layers + 3 * vision.patch_side_px**2 + embed_dim)
    else:
        widths = (vision.width << stage for stage in range(4))
        num_needed = 32 * vision.width * (3 * 32 * vision.width + embed_dim)
        num_needed += sum(17 * width**2 * num for width, num in zip(widths, vision.num_blocks, strict=True))
    num_needed += text.width * (12 * text.width * text.num_layers + VOCABULARY_SIZE)
    if num_needed > num_given:
        raise ModelError(
            f"the parameters contradict each other: {vision} and {text} need {num_needed:,} numbers or more, "
            f"there are {num_given:,}",
            remedy=_DAMAGED,
        )


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
