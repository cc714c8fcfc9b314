"""The work of `prepare` on one record alone, which runs in any process and order."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from declip_cli.data.prepare.config import CleanConfig, PrepareConfig
from declip_cli.data.prepare.hashes import hash64
from declip_cli.data.prepare.images import perceptual_hash, shrink_image
from declip_cli.data.sources.records import Found, Rejected
from declip_cli.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair ready to be written."""

    key: str
    captions: tuple[str, ...]
    jpeg: bytes
    size: tuple[int, int]
    """Width and height, in pixels."""
    original_size: tuple[int, int]
    split: str = ""
    image_hash: int = 0
    """Of the image file as it came; 0 where it was not asked for."""
    phash: int = 0
    """Perceptual hash; 0 where it was not asked for or the image has no structure."""


def process_records(records: Sequence[Found], config: PrepareConfig) -> list[Pair | Rejected]:
    """Load, filter, shrink and encode records one by one; return one outcome per record, in order."""
    return [_process(record, config) for record in records]


def _process(record: Found, config: PrepareConfig) -> Pair | Rejected:
    clean, key = config.clean, record.key.encode("utf-8", "backslashreplace").decode()
    if isinstance(record, Rejected):
        return Rejected(key, record.cause, record.is_bad)
    try:
        sample = record.load()
        kept = [(text, caption_problem(text, clean)) for text in sample.captions]
        captions = tuple(text for text, problem in kept if not problem)
        if not captions:
            return Rejected(key, kept[0][1], is_bad=False)
        small = shrink_image(sample.encoded, side_px=config.image_side_px, quality=config.quality)
    except DataError as error:
        return Rejected(key, error.cause)
    problem = image_problem(*small.original_size, clean)
    if problem:
        return Rejected(key, problem, is_bad=False)
    return Pair(
        key=key,
        captions=captions,
        jpeg=small.jpeg,
        size=small.size,
        original_size=small.original_size,
        split=record.split,
        image_hash=hash64(sample.encoded) if clean.duplicates != "keep" else 0,
        phash=perceptual_hash(small.pixels) if clean.needs_perceptual_hash else 0,
    )


def caption_problem(caption: str, config: CleanConfig) -> str:
    """Name the cause for which a stripped caption is filtered out; empty if it stays."""
    if len(caption) < config.min_caption_chars:
        return "caption too short"
    if config.max_caption_chars is not None and len(caption) > config.max_caption_chars:
        return "caption too long"
    letters = [_script(character) for character in caption if character.isalpha()] if config.scripts else []
    wanted = {script.upper() for script in config.scripts}
    return "other script" if 2 * sum(letter in wanted for letter in letters) < len(letters) else ""


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HIRAGANA, …."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def image_problem(width: int, height: int, config: CleanConfig) -> str:
    """Name the cause for which an image of this size, in pixels as it came, is filtered out; empty if it stays."""
    if min(width, height) < config.min_side_px:
        return "image too small"
    is_long = config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height)
    return "aspect ratio" if is_long else ""
