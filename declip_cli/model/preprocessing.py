"""From a decoded image to what the image tower takes: size, filter, mean and deviation."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from declip_cli.errors import ModelError

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's, in [0, 1], as the original uses everywhere (prototype/data/imagenet_dataloader.py)."""
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's data; most of OpenCLIP's models keep them."""
ResizeMode: TypeAlias = Literal["shortest", "squash"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
CropAt: TypeAlias = Literal["round", "floor"]
_MAX_RESIZE = 8
"""Largest ratio of `resize_px` to the side; beyond it a file is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image is prepared for evaluation."""

    image_side_px: int
    """S: side of the square that the model sees."""
    resize_px: int
    """`shortest`: length of the shorter side before the center crop; `squash`: S."""
    resize_mode: ResizeMode = "shortest"
    """`squash` resizes both sides to S, whatever the image's shape, and cuts nothing off."""
    interpolation: Interpolation = "bilinear"
    crop_at: CropAt = "round"
    """Where the crop starts if an odd number of pixels is cut off: half of it rounded to even (torchvision, OpenCLIP),
    or rounded down (Hugging Face)."""
    mean: tuple[float, float, float] = IMAGE_MEAN
    """Of each channel, in [0, 1]; subtracted."""
    std: tuple[float, float, float] = IMAGE_STD
    """Of each channel, in [0, 1]; divided by."""

    def transform_options(self) -> dict[str, Any]:
        """Return all that `eval_transform` needs to turn an image into a square."""
        return {
            "side_px": self.image_side_px,
            "resize_px": self.resize_px,
            "interpolation": self.interpolation,
            "is_squashed": self.resize_mode == "squash",
            "is_floored": self.crop_at == "floor",
        }

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        values = asdict(self)
        return values | {"mean": list(self.mean), "std": list(self.std)}


def read_preprocessing(given: Mapping[str, Any], *, remedy: str) -> Preprocessing:
    """Read what `Preprocessing.to_json` wrote, or what another project's configuration was translated to.

    Args:
        given: from a file that may be damaged; `resize_mode` and `crop_at` may be left out.
        remedy: what to do if it is.

    Returns:
        The same, checked.

    Raises:
        KeyError: something is missing.
        ModelError: a value is none that images can be prepared with.
    """
    side, resize, mode = given["image_side_px"], given["resize_px"], given.get("resize_mode", "shortest")
    least, most = (side, _MAX_RESIZE * side if mode == "shortest" else side) if type(side) is int else (1, 0)
    crop_at = given.get("crop_at", "round")
    fields: tuple[tuple[str, Any, bool, str], ...] = (
        ("image_side_px", side, type(side) is int and side > 0, "a whole number above 0"),
        ("resize_px", resize, type(resize) is int and least <= resize <= most, f"in [{least}, {most}]"),
        ("resize_mode", mode, mode in ("shortest", "squash"), "shortest or squash"),
        (
            "interpolation",
            given["interpolation"],
            given["interpolation"] in ("bilinear", "bicubic"),
            "bilinear or bicubic",
        ),
        ("crop_at", crop_at, crop_at in ("round", "floor"), "round or floor"),
        ("mean", given["mean"], _are_numbers(given["mean"]), "three numbers"),
        ("std", given["std"], _are_numbers(given["std"]) and min(given["std"]) > 0, "three numbers above 0"),
    )
    for name, value, is_right, expected in fields:
        if not is_right:
            raise ModelError(f"preprocessing.{name} is {value!r:.60}; expected {expected}", remedy=remedy)
    values: dict[str, Any] = {
        name: tuple(map(float, value)) if name in ("mean", "std") else value for name, value, *_ in fields
    }
    return Preprocessing(**values)


def _are_numbers(values: object) -> bool:
    is_list = isinstance(values, list | tuple) and len(values) == 3
    return is_list and all(type(v) in (int, float) and math.isfinite(v) for v in values)  # type: ignore[attr-defined]
