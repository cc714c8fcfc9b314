"""One image on its way into a shard: decoded, made smaller if it is larger than asked, encoded, hashed perceptually."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional

from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import bad_image, decode_smaller, read_header

_HASHED_SIDE_PX = 32
_HASHED_FREQUENCIES = 8
_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class ShrunkImage:
    """An image as it goes into a shard."""

    jpeg: bytes
    size: tuple[int, int]
    """Width and height, in pixels."""
    original_size: tuple[int, int]
    pixels: Pixels
    """RGB, uint8, for the perceptual hash; of a JPEG passed through, smaller than it is."""


def shrink_image(data: bytes, *, side_px: int, quality: int) -> ShrunkImage:
    """Make an encoded image as small as training needs it.

    A JPEG that is small enough and upright keeps its bytes; everything else is encoded again.

    Args:
        data: the image.
        side_px: what the shorter side is reduced to, keeping the aspect ratio; never enlarged.
        quality: of the JPEG, 1 to 100.

    Raises:
        DataError: it cannot be decoded; see `decode.decode_image`.
    """
    header = read_header(data)
    width, height, is_plain_jpeg, is_upright = header
    if is_plain_jpeg and is_upright and min(height, width) <= side_px:
        pixels = decode_smaller(data, header, _HASHED_SIDE_PX)
        return ShrunkImage(data, (width, height), (width, height), pixels)
    pixels = decode_smaller(data, header, side_px)
    if not is_plain_jpeg:
        height, width = pixels.shape[:2]
    scale = min(1.0, side_px / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = _shrink(pixels, *size)
    encoding = [cv2.IMWRITE_JPEG_QUALITY, quality]
    is_encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), encoding)
    if not is_encoded:
        raise bad_image("unsupported pixels", f"{width} x {height} cannot be written as JPEG")
    return ShrunkImage(jpeg.tobytes(), size, (width, height), pixels)


def _shrink(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize as Pillow's antialiased bicubic filter does, which CLIP's models see images through.

    PyTorch's kernel for bytes gives the same numbers in a third of the time of OpenCV's INTER_AREA (img2dataset's).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, H, W), in memory as it was: the fast path
    images = functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def decode_for_phash(data: bytes) -> Pixels:
    """Decode an image as small as its perceptual hash allows; errors as in `decode.decode_image`."""
    return decode_smaller(data, read_header(data), _HASHED_SIDE_PX)


def perceptual_hash(pixels: Pixels) -> int:
    """Hash what an image looks like: re-encoded or resized copies differ in few bits.

    A bit for each of the 8 × 8 lowest frequencies of the gray image: whether it lies above their median by a
    tenth of their spread. The published hash takes the median itself; then the many frequencies near zero of
    symmetric drawings fall to either side by chance (of 1,217 icons encoded twice, 66 % were within 4 bits;
    with the margin, 99 %).

    Args:
        pixels: RGB, uint8, (H, W, 3).

    Returns:
        64 bits; 0 for an image without structure, which is like none.

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1.
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (_HASHED_SIDE_PX, _HASHED_SIDE_PX), interpolation=cv2.INTER_AREA)
    if int(small.max()) - int(small.min()) < 8:
        return 0
    low = cv2.dct(small.astype(np.float32))[1 : _HASHED_FREQUENCIES + 1, 1 : _HASHED_FREQUENCIES + 1]
    bits = (low > np.median(low) + _MARGIN * low.std()).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
