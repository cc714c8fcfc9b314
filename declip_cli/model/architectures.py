"""Names of architectures and their dimensions."""

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any

from declip_cli.config import ModelConfig
from declip_cli.errors import ChoiceError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class VitDims:
    """A vision transformer."""

    patch_side_px: int
    width: int
    num_layers: int
    num_heads: int
    mlp_ratio: float = 4.0
    """Width of the MLPs' hidden layer, in widths; see `mlp_width`."""
    norm_eps: float = 1e-5
    """Added to the variance in layer norms."""
    quick_gelu: bool = True
    """x·sigmoid(1.702x), as OpenAI and the original; false is the exact GELU."""
    has_pre_norm: bool = True
    """A layer norm before the first block (CLIP's; SLIP's towers, made of timm's, have none)."""

    @property
    def mlp_width(self) -> int:
        """Width of the MLPs' hidden layer, as OpenCLIP rounds it."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetDims:
    """A modified ResNet."""

    num_blocks: tuple[int, ...]
    width: int
    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDims:
    """A text transformer."""

    context_length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    quick_gelu: bool = True

    @property
    def mlp_width(self) -> int:
        """Width of the MLPs' hidden layer, as OpenCLIP rounds it."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A dual encoder's dimensions."""

    image_side_px: int = 224
    embed_dim: int = 512
    vision: VitDims | ResNetDims
    text: TextDims = TextDims()

    def with_activation(self, quick_gelu: bool) -> "Architecture":
        """Return the same with another activation in both towers; ResNets have ReLUs only."""
        vision = self.vision if isinstance(self.vision, ResNetDims) else replace(self.vision, quick_gelu=quick_gelu)
        return replace(self, vision=vision, text=replace(self.text, quick_gelu=quick_gelu))


_TINY_TEXT = TextDims(context_length=24, width=128, num_layers=1, num_heads=4)
_SMALL_TEXT = TextDims(context_length=77, width=384, num_layers=8, num_heads=6)
ARCHITECTURES: dict[str, Architecture] = {
    "vit-b32": Architecture(vision=VitDims(patch_side_px=32, width=768, num_layers=12, num_heads=12)),
    "vit-b16": Architecture(vision=VitDims(patch_side_px=16, width=768, num_layers=12, num_heads=12)),
    "vit-s16": Architecture(vision=VitDims(patch_side_px=16, width=384, num_layers=12, num_heads=6), text=_SMALL_TEXT),
    "vit-tiny64": Architecture(
        image_side_px=64,
        embed_dim=192,
        vision=VitDims(patch_side_px=8, width=192, num_layers=6, num_heads=3),
        text=TextDims(context_length=32, width=192, num_layers=4, num_heads=3),
    ),
    "vit-tiny32": Architecture(
        image_side_px=32,
        embed_dim=128,
        vision=VitDims(patch_side_px=8, width=96, num_layers=4, num_heads=3),
        text=_TINY_TEXT,
    ),
    "rn50": Architecture(embed_dim=1024, vision=ResNetDims(num_blocks=(3, 4, 6, 3), width=64, num_heads=32)),
    "rn101": Architecture(embed_dim=512, vision=ResNetDims(num_blocks=(3, 4, 23, 3), width=64, num_heads=32)),
    "rn-tiny64": Architecture(
        image_side_px=64,
        embed_dim=128,
        vision=ResNetDims(num_blocks=(1, 1, 1, 1), width=16, num_heads=8),
        text=_TINY_TEXT,
    ),
}
"""ViT-B, RN50 and RN101 as in CLIP, arXiv 2103.00020, tables 19 and 20; vit-s16 as in SLIP; tiny ones are ours."""


def find_architecture(config: ModelConfig) -> Architecture:
    """Look an architecture up and apply the overrides of the configuration.

    Args:
        config: name and overrides.

    Returns:
        The dimensions to build.

    Raises:
        ConfigError: the name is unknown (ChoiceError), or a side does not fit the patches.
    """
    if config.arch not in ARCHITECTURES:
        close = difflib.get_close_matches(config.arch, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ChoiceError(
            f"unknown architecture {config.arch!r}", remedy=f"{hint}--arch takes {', '.join(ARCHITECTURES)}"
        )
    base = ARCHITECTURES[config.arch]
    side = config.image_side_px or base.image_side_px
    stride = base.vision.patch_side_px if isinstance(base.vision, VitDims) else 32
    require(
        side > 0 and side % stride == 0,
        f"model.image_side_px must be a multiple of {stride} for {config.arch} (got {side})",
        remedy=f"--set model.image_side_px={max(1, round(side / stride)) * stride}",
    )
    length = config.context_length or base.text.context_length
    require(
        length >= 3,
        f"model.context_length must be at least 3: start, one token, end (got {length})",
        remedy="--set model.context_length=77",
    )
    require(
        config.embed_dim is None or config.embed_dim > 0,
        f"model.embed_dim must be positive (got {config.embed_dim})",
        remedy=f"--set model.embed_dim={base.embed_dim}",
    )
    found = replace(
        base,
        image_side_px=side,
        embed_dim=config.embed_dim or base.embed_dim,
        text=replace(base.text, context_length=length),
    )
    return found.with_activation(config.quick_gelu)


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """Write dimensions as plain values, so that a model can be opened whatever its name means later."""
    vision = {"kind": "vit" if isinstance(architecture.vision, VitDims) else "resnet"} | asdict(architecture.vision)
    return asdict(architecture) | {"vision": vision}
