"""One picture on its way into a shard: decoded, made smaller if it is larger than asked, encoded as JPEG."""

from dataclasses import dataclass

import cv2
import numpy as np

from declip_cli.data.decode import (
    JpegFrame,
    Pixels,
    bad_picture,
    decode_image,
    decode_jpeg,
    is_plain_jpeg,
    read_jpeg_frame,
)

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
    frame = read_jpeg_frame(data)
    if not is_plain_jpeg(frame):
        pixels = decode_image(data)
        height, width = pixels.shape[:2]
    else:
        height, width = frame.height, frame.width
        if min(height, width) <= side_px and frame.orientation == 1:
            checked = decode_jpeg(data, frame, reduction=_reduction(frame, _HASHED_SIDE_PX))
            return SmallPicture(data, width, height, width, height, checked)
        pixels = decode_jpeg(data, frame, reduction=_reduction(frame, side_px))
    pixels = shrink_pixels(pixels, *_goal(height, width, side_px))
    encoding = [cv2.IMWRITE_JPEG_QUALITY, quality]
    is_encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), encoding)
    if not is_encoded:
        raise bad_picture("unsupported pixels", f"{width} x {height} cannot be written as JPEG")
    return SmallPicture(jpeg.tobytes(), pixels.shape[1], pixels.shape[0], width, height, pixels)


def _reduction(frame: JpegFrame, side_px: int) -> int:
    """Return the largest power of two by which JPEG can be decoded smaller and still be large enough."""
    return next((r for r in (8, 4, 2) if min(frame.height, frame.width) >= r * side_px), 1)


def _goal(height: int, width: int, side_px: int) -> tuple[int, int]:
    scale = min(1.0, side_px / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink_pixels(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize to a smaller size without aliasing.

    Whole factors of two and more are averaged first; the rest, below 2, is a small Gaussian blur and bicubic
    interpolation. On photographs this is as close to Pillow's antialiased bicubic filter as OpenCV's area
    averaging is, and three to four times faster.

    Args:
        pixels: uint8, (H, W, 3).
        height: new height in pixels, at most H.
        width: new width in pixels, at most W.

    Returns:
        Pixels, uint8, (height, width, 3).
    """
    factor = min(pixels.shape[0] // height, pixels.shape[1] // width)
    if factor >= 2:
        size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
        trimmed = pixels[: size[1] * factor, : size[0] * factor]
        pixels = np.asarray(cv2.resize(trimmed, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if pixels.shape[:2] == (height, width):
        return pixels
    ratio = max(pixels.shape[0] / height, pixels.shape[1] / width)
    sigma = 0.45 * (ratio**2 - 1) ** 0.5
    blurred = cv2.GaussianBlur(pixels, (3, 3), sigma) if sigma > 0.2 else pixels
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
