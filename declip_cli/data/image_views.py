"""Pictures into the square views that towers see: random ones for training, a fixed one for evaluation."""

import numpy as np
from PIL import Image

from declip_cli.data.decode import Pixels, decode_image


def evaluation_view(data: bytes, *, side_px: int, resize_px: int) -> Pixels:
    """Cut the middle out of a picture, the same each time.

    The shorter side is resized to `resize_px` with an antialiased bilinear filter, then a square of `side_px`
    is cut from the centre: to the pixel what torchvision's Resize and CenterCrop make of a Pillow picture.

    Args:
        data: an encoded picture.
        side_px: S, at most `resize_px`.
        resize_px: length of the shorter side before the cut.

    Returns:
        RGB, uint8, (S, S, 3).

    Raises:
        DataError: the picture cannot be decoded.
    """
    pixels = decode_image(data)  # (H, W, 3)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    new_width, new_height = (int(resize_px * side / shorter) for side in (width, height))
    left, top = (int(round((side - side_px) / 2.0)) for side in (new_width, new_height))
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + side_px, top + side_px)), dtype=np.uint8)  # (S, S, 3)
