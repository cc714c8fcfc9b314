"""Encoded images into upright RGB pixels; whatever cannot be shown faithfully is refused with a cause."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from declip_cli.data.dataset import Pixels
from declip_cli.errors import DataError

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: a quarter of a GiB of RGB."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
_JPEG_FRAME = struct.Struct(">xxxxBHHB")  # after marker and length: bits, height, width, components
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


class ImageHeader(NamedTuple):
    """What an image file says about itself before it is decoded."""

    width: int
    """Of the upright image, in pixels."""
    height: int
    is_plain_jpeg: bool
    """A gray or RGB JPEG, which `decode_jpeg` decodes fast, if asked at a fraction of its size."""
    is_upright: bool
    """Whether pixels are stored as they are shown."""


def largest_reduction(side_px: int, wanted_px: int) -> int:
    """Return the largest of 1, 2, 4 and 8 by which a side can be divided and still be as long as wanted."""
    return next((factor for factor in (8, 4, 2) if side_px >= factor * wanted_px), 1)


def bad_image(cause: str, detail: str) -> DataError:
    """Word the error of an image that cannot be used, counted under a cause of a few words; return it."""
    return DataError(
        f"an image cannot be read: {cause} ({detail})",
        remedy="replace it, or leave it to be skipped and counted",
        cause=cause,
    )


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image as a person would see it.

    Rotated as its EXIF data say, transparency laid over white, 16 bits cut to 8, CMYK and palettes turned
    into RGB, of an animation the first frame. Color profiles are ignored, as in torchvision.

    Args:
        data: an encoded image (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF).
        max_pixels: larger images are refused before memory is taken for them.

    Returns:
        RGB, uint8, (height, width, 3).

    Raises:
        DataError: with `cause` `empty file`, `not an image`, `truncated image`, `damaged image`,
            `too many pixels` or `unsupported pixels`.
    """
    if _plain_jpeg_size(data, max_pixels):
        return decode_jpeg(data)
    with _opened(data, max_pixels) as image:
        if not _is_plain_jpeg(image):
            image.load()
            return pixels_of(image)
    return decode_jpeg(data)


def pixels_of(image: Image.Image) -> Pixels:
    """Turn an image that Pillow has opened into upright RGB, as `decode_image` does; errors as there."""
    return np.array(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read size, kind and orientation of an image without decoding it; arguments and errors as in `decode_image`."""
    size = _plain_jpeg_size(data, max_pixels)
    if size:
        return ImageHeader(*size, is_plain_jpeg=True, is_upright=True)
    with _opened(data, max_pixels) as image:
        exif = Image.Exif()  # not `getexif`, which also reads XMP: OpenCV does not
        try:
            exif.load(image.info.get("exif", b""))
            orientation = exif.get(_ORIENTATION, 1)
        except Exception:  # nonsense in the EXIF data, which may raise anything, turns nothing
            orientation = 1
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        return ImageHeader(width, height, _is_plain_jpeg(image), orientation == 1)


def decode_jpeg(data: bytes, header: ImageHeader | None = None, *, reduction: int = 1) -> Pixels:
    """Decode a plain JPEG, if asked at a fraction of its size, which is cheaper.

    A file with damage that libjpeg can repair is decoded; libjpeg writes its own line about it ("Corrupt JPEG data")
    to stderr, which OpenCV offers no way to stop or to notice, whatever OPENCV_LOG_LEVEL is.

    Args:
        data: the JPEG file.
        header: what was read of it, if pixels must be of that size.
        reduction: 1, 2, 4 or 8; sides are divided by this and rounded up.

    Returns:
        RGB, upright, uint8, (ceil(height / reduction), ceil(width / reduction), 3).

    Raises:
        DataError: `truncated image` or `damaged image`.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _REDUCED[reduction])
    except cv2.error as error:
        raise bad_image("damaged image", str(error)) from error
    if pixels is None:
        has_end = data.rstrip(b"\0").endswith(b"\xff\xd9")
        cause = "damaged image" if has_end else "truncated image"
        raise bad_image(cause, f"JPEG, {len(data)} bytes")
    if header and pixels.shape[:2] != (-(-header.height // reduction), -(-header.width // reduction)):
        raise bad_image("damaged image", f"JPEG, {header.width} x {header.height} by its header")
    return np.asarray(pixels, dtype=np.uint8)


def decode_smaller(data: bytes, header: ImageHeader, shorter_px: int) -> Pixels:
    """Decode an image whose shorter side is needed so long only, a plain JPEG at the smallest size that gives that.

    Returns and raises what `decode_image` does.
    """
    if not header.is_plain_jpeg:
        return decode_image(data)
    shorter = min(header.width, header.height)
    return decode_jpeg(data, header, reduction=largest_reduction(shorter, shorter_px))


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image; what goes wrong then and inside becomes an error with a cause."""
    if not data:
        raise bad_image("empty file", "0 bytes")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise bad_image("too many pixels", f"{image.width} x {image.height}, at most {max_pixels}")
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bad_image("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise bad_image("not an image", f"{len(data)} bytes, begins with {data[:8]!r}") from error
    except DataError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, even IndexError
        cause = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        raise bad_image(cause, str(error) or type(error).__name__) from error


def _plain_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Find the size of a gray or RGB JPEG without EXIF data, 20 times as fast as Pillow; None where it has to look."""
    if not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + _JPEG_FRAME.size <= len(data) and data[at] == 0xFF and data[at + 1] != 0xE1:  # APP1 may be EXIF
        if 0xC0 <= data[at + 1] <= 0xC2:  # baseline, extended or progressive
            bits, height, width, components = _JPEG_FRAME.unpack_from(data, at)
            is_plain = bits == 8 and components in (1, 3) and 0 < width * height <= max_pixels
            return (width, height) if is_plain else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, in one of Pillow's containers
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise bad_image("unsupported pixels", "floating-point numbers")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
