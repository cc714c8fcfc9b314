"""One picture on its way into a shard: decoded, made smaller if it is larger than asked, encoded as JPEG."""

from dataclasses import dataclass

import cv2
import numpy as np

from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import bad_picture, decode_smaller, read_header

_HASHED_SIDE_PX = 32


@dataclass(frozen=True, slots=True)
class SmallPicture:
    """A picture as it goes into a shard."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    pixels: Pixels
    """RGB, uint8, for the perceptual hash; of a JPEG passed through, smaller than it is."""


def shrink_picture(data: bytes, *, side_px: int, quality: int) -> SmallPicture:
    """Make a picture as small as training needs it.

    A JPEG that is small enough and upright keeps its bytes; everything else is encoded again.

    Args:
        data: an encoded picture.
        side_px: what the shorter side is reduced to, keeping the aspect ratio; never enlarged.
        quality: of the JPEG, 1 to 100.

    Returns:
        The picture.

    Raises:
        DataError: it cannot be decoded; see `decode.decode_image`.
    """
    header = read_header(data)
    width, height, is_plain_jpeg, is_upright = header
    if is_plain_jpeg and is_upright and min(height, width) <= side_px:
        return SmallPicture(data, width, height, width, height, decode_smaller(data, header, _HASHED_SIDE_PX))
    pixels = decode_smaller(data, header, side_px)
    if not is_plain_jpeg:
        height, width = pixels.shape[:2]
    pixels = shrink_pixels(pixels, *_goal(height, width, side_px))
    encoding = [cv2.IMWRITE_JPEG_QUALITY, quality]
    is_encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), encoding)
    if not is_encoded:
        raise bad_picture("unsupported pixels", f"{width} x {height} cannot be written as JPEG")
    return SmallPicture(jpeg.tobytes(), pixels.shape[1], pixels.shape[0], width, height, pixels)


def decode_for_looks(data: bytes) -> Pixels:
    """Decode a picture as small as its perceptual hash allows.

    Args:
        data: an encoded picture.

    Returns:
        RGB, uint8, (H, W, 3).

    Raises:
        DataError: as of `decode.decode_image`.
    """
    return decode_smaller(data, read_header(data), _HASHED_SIDE_PX)


def _goal(height: int, width: int, side_px: int) -> tuple[int, int]:
    scale = min(1.0, side_px / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink_pixels(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize to a smaller size without aliasing.

    Below half the size is averaged by area. Between, a 3 × 3 Gaussian blur and bicubic interpolation are closer
    to Pillow's antialiased bicubic filter than area averaging is, and several times faster; the blur's width
    was fitted to that filter on six photographs.

    Args:
        pixels: uint8, (H, W, 3).
        height: new height in pixels, at most H.
        width: new width in pixels, at most W.

    Returns:
        Pixels, uint8, (height, width, 3).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    beyond = max(pixels.shape[0] / height, pixels.shape[1] / width) - 1.0
    if beyond > 1.05:
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    sigma = 0.385 + 0.22 * beyond + 0.17 * beyond**2
    blurred = cv2.GaussianBlur(pixels, (3, 3), sigma)
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
