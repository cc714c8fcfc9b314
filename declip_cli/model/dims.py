"""The dimensions of a dual encoder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


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


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """Write dimensions as plain values, so that a model can be opened whatever its name means later."""
    vision = {"kind": "vit" if isinstance(architecture.vision, VitDims) else "resnet"} | asdict(architecture.vision)
    return asdict(architecture) | {"vision": vision}


def read_architecture(described: Mapping[str, Any]) -> Architecture:
    """Read what `describe_architecture` wrote.

    Raises:
        KeyError, TypeError: it is something else.
    """
    vision, rest = dict(described["vision"]), dict(described)
    old = rest.pop("quick_gelu", None)  # of both towers, as earlier versions wrote it
    kind = {"vit": VitDims, "resnet": ResNetDims}[vision.pop("kind")]
    if "num_blocks" in vision:
        vision["num_blocks"] = tuple(vision["num_blocks"])
    found = Architecture(**rest | {"vision": kind(**vision), "text": TextDims(**described["text"])})
    return found if old is None else found.with_activation(old)
