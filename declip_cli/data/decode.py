"""Encoded pictures into upright RGB pixels; whatever cannot be shown faithfully is refused with a cause."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from declip_cli.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: a quarter of a GiB of RGB."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """What a JPEG file says about itself before it is decoded."""

    width: int
    """Of the upright picture, in pixels."""
    height: int
    channels: int
    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright as stored."""


def bad_picture(cause: str, detail: str) -> DataError:
    """Word the error of a picture that cannot be used.

    Args:
        cause: a few words under which such pictures are counted.
        detail: what was found.

    Returns:
        The error, to be raised.
    """
    return DataError(
        f"a picture cannot be read: {cause} ({detail})",
        remedy="replace it, or leave it to be skipped and counted",
        cause=cause,
    )


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a picture as a person would see it.

    Rotated as its EXIF data say, transparency laid over white, 16 bits cut to 8, CMYK and palettes turned
    into RGB, of an animation the first frame. Colour profiles are ignored, as in torchvision.

    Args:
        data: an encoded picture (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF).
        max_pixels: larger pictures are refused before memory is taken for them.

    Returns:
        RGB, uint8, (height, width, 3).

    Raises:
        DataError: with `cause` `empty file`, `not a picture`, `truncated picture`, `damaged picture`,
            `too many pixels` or `unsupported pixels`.
    """
    frame = read_jpeg_frame(data, max_pixels=max_pixels)
    if is_plain_jpeg(frame):
        return decode_jpeg(data, frame)
    return _decode_any(data, max_pixels)


def is_plain_jpeg(frame: JpegFrame) -> bool:
    """Tell whether `decode_jpeg` shows this picture rightly: grey or three-channel JPEG, not CMYK."""
    return frame.channels in (1, 3)


def decode_jpeg(data: bytes, frame: JpegFrame, *, reduction: int = 1) -> Pixels:
    """Decode a grey or three-channel JPEG, if asked at a fraction of its size, which is cheaper.

    A file with damage that libjpeg can repair is decoded; libjpeg writes its own line about it ("Corrupt JPEG data")
    to stderr, which OpenCV offers no way to stop or to notice, whatever OPENCV_LOG_LEVEL is.

    Args:
        data: the JPEG file.
        frame: its header.
        reduction: 1, 2, 4 or 8; sides are divided by this and rounded up.

    Returns:
        RGB, upright, uint8, (ceil(height / reduction), ceil(width / reduction), 3).

    Raises:
        DataError: `truncated picture` or `damaged picture`.
    """
    flags = _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise bad_picture("damaged picture", str(error)) from error
    if pixels is None:
        has_end = data.rstrip(b"\0").endswith(b"\xff\xd9")
        cause = "damaged picture" if has_end else "truncated picture"
        raise bad_picture(cause, f"JPEG, {len(data)} bytes")
    if frame.orientation > 1:
        pixels = _UPRIGHT[frame.orientation](pixels)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def read_jpeg_frame(data: bytes, *, max_pixels: int = MAX_PIXELS) -> JpegFrame:
    """Read size, channels and orientation from a JPEG file's header.

    Args:
        data: any file.
        max_pixels: larger pictures are refused.

    Returns:
        The header; with 0 channels if this is not a JPEG file or its header makes no sense.

    Raises:
        DataError: `empty file` or `too many pixels`.
    """
    if not data:
        raise bad_picture("empty file", "0 bytes")
    orientation = 1
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        elif marker in _START_OF_FRAME:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            _check_pixels(width, height, max_pixels)
            if orientation > 4:
                width, height = height, width
            channels = data[at + 9] if data[at + 4] == 8 and width and height else 0
            return JpegFrame(width, height, channels, orientation)
        else:
            length = int.from_bytes(data[at + 2 : at + 4])
            if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _exif_orientation(data[at + 10 : at + 2 + length])
            at += 2 + length
    return JpegFrame(0, 0, 0, 1)


def _exif_orientation(tiff: bytes) -> int:
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if order == "little" else "big")

    directory = number(4, 4)
    for i in range(number(directory, 2)):
        entry = directory + 2 + 12 * i
        if number(entry, 2) == 0x0112:
            orientation = number(entry + 8, 2)
            return orientation if 1 <= orientation <= 8 else 1
        if entry > len(tiff):
            break
    return 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise bad_picture("too many pixels", f"{width} x {height}, at most {max_pixels}")


def _decode_any(data: bytes, max_pixels: int) -> Pixels:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_pixels(*image.size, max_pixels)
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bad_picture("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise bad_picture("not a picture", f"{len(data)} bytes, begins with {data[:8]!r}") from error
    except DataError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, even IndexError
        cause = "truncated picture" if "truncated" in str(error) else "damaged picture"
        raise bad_picture(cause, str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, in one of Pillow's containers
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise bad_picture("unsupported pixels", "floating-point numbers")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
