"""Images into the square views that towers see: random ones for training, a fixed one for evaluation."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from declip_cli.config import AugmentConfig, ImageView
from declip_cli.data.color import SMALLEST_BLUR_SIGMA_PX, Colors, blur, jitter
from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import (
    ImageHeader,
    decode_image,
    decode_jpeg,
    decode_smaller,
    largest_reduction,
    read_header,
)
from declip_cli.errors import require

_LOG_RATIO = math.log(4 / 3)
_UNCHANGED = Colors()


class Crop(NamedTuple):
    """A rectangle of the upright image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class ViewDraw(NamedTuple):
    """All that chance decided about one view."""

    crop: Crop
    colors: Colors = _UNCHANGED
    blur_sigma_px: float = 0.0
    """0 leaves the view sharp."""
    is_flipped: bool = False


class Box(NamedTuple):
    """Where a view lies in the upright image, in shares of its width and height; left > right where it is flipped."""

    left: float
    top: float
    right: float
    bottom: float


class OpenedImage(NamedTuple):
    """An image ready to be cropped."""

    header: ImageHeader
    content: bytes | Pixels
    """RGB, uint8, (height, width, 3); or a JPEG that waits for the crops to be decoded smaller."""


class ImageViews:
    """Draw training views: random crops of one decoded image, augmented as the original did.

    `plain` is a random crop (STANDARD_SLIP); `augmented` adds color jitter, grays, blur and flips (MOCOV2); `whole` is
    the image as it is, pressed into the square.
    All that is random is drawn first; then a large JPEG is decoded once, at the smallest of 1, 1/2, 1/4 and
    1/8 of its size at which no crop has to be enlarged. What has probability 0 costs nothing.

    Args:
        config: how views are drawn.
        side_px: S, side of the square views.

    Source: DeCLIP's data/transforms.py; MoCo v2, arXiv 2003.04297, section 4.
    """

    def __init__(self, config: AugmentConfig, side_px: int) -> None:
        self._config = config
        self._side_px = side_px

    def open(self, image: bytes | Pixels) -> OpenedImage:
        """Decode an image, unless it is a JPEG so large that knowing the crops may save work.

        Args:
            image: encoded, or RGB, uint8, (H, W, 3).

        Returns:
            The image; views drawn from it are the same however often it is used.

        Raises:
            DataError: the image cannot be decoded.
        """
        if isinstance(image, bytes):
            header = read_header(image)
            if header.is_plain_jpeg and min(header.width, header.height) >= 2 * self._side_px:
                return OpenedImage(header, image)
            image = decode_smaller(image, header, self._side_px)
        return OpenedImage(ImageHeader(image.shape[1], image.shape[0], False, True), image)

    def draw(self, opened: OpenedImage, kinds: Sequence[ImageView], rng: random.Random, out: Pixels) -> list[Box]:
        """Draw the views of one image.

        Args:
            opened: from `open`.
            kinds: V kinds of views, in order.
            rng: decides everything; the same state gives the same pixels.
            out: filled with RGB, uint8, (V, S, S, 3).

        Returns:
            Where each view lies.

        Raises:
            DataError: the image cannot be decoded.
        """
        header, pixels = opened
        draws = [self._decide(kind, header.width, header.height, rng) for kind in kinds]
        if isinstance(pixels, bytes):
            shortest = min(min(draw.crop.width, draw.crop.height) for draw in draws)
            pixels = decode_jpeg(pixels, header, reduction=largest_reduction(shortest, self._side_px))
        for draw, view in zip(draws, out, strict=True):
            self._render(pixels, pixels.shape[1] / header.width, draw, view)
        return [_box_of(draw, header.width, header.height) for draw in draws]

    def _decide(self, kind: ImageView, width: int, height: int, rng: random.Random) -> ViewDraw:
        """Draw all that is random about one view; pixels play no part in it."""
        config = self._config
        if kind == "whole":
            return ViewDraw(Crop(0, 0, width, height))
        if kind == "plain":
            return ViewDraw(draw_crop(width, height, config.plain_crop_area_min, rng))
        crop = draw_crop(width, height, config.crop_area_min, rng)
        colors, sigma_px = _UNCHANGED, 0.0
        if _happens(config.jitter_probability, rng):
            colors = Colors(
                brightness=rng.uniform(1.0 - config.brightness, 1.0 + config.brightness),
                contrast=rng.uniform(1.0 - config.contrast, 1.0 + config.contrast),
                saturation=rng.uniform(1.0 - config.saturation, 1.0 + config.saturation),
                hue_turns=rng.uniform(-config.hue, config.hue),
            )
        if _happens(config.grayscale_probability, rng):
            colors = colors._replace(saturation=0.0)
        if _happens(config.blur_probability, rng):
            sigma_px = rng.uniform(config.blur_sigma_min_px, config.blur_sigma_max_px)
        return ViewDraw(crop, colors, sigma_px, _happens(config.flip_probability, rng))

    def _render(self, pixels: Pixels, scale: float, draw: ViewDraw, out: Pixels) -> None:
        left, top, width, height = draw.crop
        if scale != 1.0:
            left, width = round(left * scale), max(1, round(width * scale))
            top, height = round(top * scale), max(1, round(height * scale))
        side = self._side_px
        # OpenCV's bilinear filter looks at four pixels; far beyond a factor of 2 it would leave too many out.
        is_far = width * height > (2 * side) ** 2
        interpolation = cv2.INTER_AREA if is_far else cv2.INTER_LINEAR
        region = pixels[top : top + height, left : left + width]  # (height, width, 3)
        view = np.asarray(cv2.resize(region, (side, side), interpolation=interpolation), dtype=np.uint8)
        if draw.colors != _UNCHANGED:
            view = jitter(view, draw.colors)
        if draw.blur_sigma_px >= SMALLEST_BLUR_SIGMA_PX:
            view = blur(view, draw.blur_sigma_px)
        if draw.is_flipped:
            cv2.flip(view, 1, dst=view)
        out[:] = view


def draw_crop(width: int, height: int, area_min: float, rng: random.Random) -> Crop:
    """Draw a rectangle of random area and aspect ratio, as torchvision's RandomResizedCrop.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        area_min: smallest share of the image; the largest is 1.
        rng: decides.

    Returns:
        A rectangle inside the image, of aspect ratio 3/4 to 4/3 up to rounding; if ten draws do not fit, as
        in a very long image, the largest such rectangle in the middle.
    """
    for _ in range(10):
        area = width * height * (area_min + (1.0 - area_min) * rng.random())
        ratio = math.exp(_LOG_RATIO * (2.0 * rng.random() - 1.0))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int((width - crop_width + 1) * rng.random())
            top = int((height - crop_height + 1) * rng.random())
            return Crop(left, top, crop_width, crop_height)
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return Crop((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height)


def _box_of(draw: ViewDraw, width: int, height: int) -> Box:
    left, top, crop_width, crop_height = draw.crop
    sides = left / width, (left + crop_width) / width
    left_side, right_side = reversed(sides) if draw.is_flipped else sides
    return Box(left_side, top / height, right_side, (top + crop_height) / height)


def _happens(probability: float, rng: random.Random) -> bool:
    return probability > 0.0 and rng.random() < probability


def eval_transform(
    image: bytes | Pixels,
    *,
    side_px: int,
    resize_px: int,
    interpolation: str = "bilinear",
    is_squashed: bool = False,
    is_floored: bool = False,
) -> Pixels:
    """Cut the middle out of an image, the same each time.

    The shorter side is resized to `resize_px` with an antialiased filter, then a square of `side_px`
    is cut from the center: to the pixel what torchvision's Resize and CenterCrop make of a Pillow image.

    Args:
        image: encoded, or RGB, uint8, (H, W, 3).
        side_px: S, at most `resize_px`.
        resize_px: length of the shorter side before the cut.
        interpolation: `bilinear` or `bicubic`.
        is_squashed: resize both sides to `resize_px`, whatever the image's shape.
        is_floored: start the cut at half the margin rounded down, as Hugging Face's processors do.

    Returns:
        RGB, uint8, (S, S, 3).

    Raises:
        ConfigError: `resize_px` is less than `side_px`.
        DataError: the image cannot be decoded.
    """
    require(
        side_px <= resize_px,
        f"images resized to {resize_px} px are too small for a view of {side_px} px",
        remedy=f"resize to at least {side_px} px",
    )
    pixels = decode_image(image) if isinstance(image, bytes) else image  # (H, W, 3)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    new_width, new_height = (int(resize_px * side / (side if is_squashed else shorter)) for side in (width, height))
    round_half = math.floor if is_floored else round
    left, top = (int(round_half((side - side_px) / 2.0)) for side in (new_width, new_height))
    # Pillow takes four bytes a pixel as they lie; three it would unpack and pack, holding up all other threads.
    padded = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)  # (H, W, 4)
    opened = Image.frombuffer("RGBX", (width, height), padded, "raw", "RGBX", 0, 1)
    resized = opened.resize((new_width, new_height), Image.Resampling[interpolation.upper()])
    middle = resized.crop((left, top, left + side_px, top + side_px)).tobytes()
    view = np.frombuffer(middle, dtype=np.uint8).reshape(side_px, side_px, 4)
    return np.asarray(cv2.cvtColor(view, cv2.COLOR_RGBA2RGB), dtype=np.uint8)  # (S, S, 3)
