"""The stage of `prepare` that works on one record alone, and so runs anywhere and in any order."""

from collections.abc import Sequence
from dataclasses import dataclass

from declip_cli.data.prepare.clean import caption_problem, perceptual_hash, picture_problem
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.hashes import hash64
from declip_cli.data.prepare.pictures import shrink_picture
from declip_cli.data.sources.records import BadRecord, Record
from declip_cli.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair ready to be written."""

    key: str
    part: str
    captions: tuple[str, ...]
    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    picture_hash: int
    """Of the picture file as it came; 0 where it was not asked for."""
    looks_hash: int
    """Perceptual hash; 0 where it was not asked for or the picture has no structure."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that makes no pair."""

    key: str
    cause: str
    is_bad: bool
    """True if it could not be read; false if it was filtered out."""


def finish_records(records: Sequence[Record], config: PrepareConfig) -> list[Pair | LeftOut]:
    """Load, filter, shrink and encode records one by one.

    Args:
        records: any.
        config: sizes, quality and filters.

    Returns:
        One outcome per record, in order.
    """
    return [_finish(record, config) for record in records]


def _finish(record: Record, config: PrepareConfig) -> Pair | LeftOut:
    clean, key = config.clean, record.key.encode("utf-8", "backslashreplace").decode()
    if isinstance(record, BadRecord):
        return LeftOut(key, record.cause, is_bad=record.is_bad)
    try:
        sample = record.load()
        kept = [(text, caption_problem(text, clean)) for text in sample.captions]
        captions = tuple(text for text, problem in kept if not problem)
        if not captions:
            return LeftOut(key, kept[0][1], is_bad=False)
        small = shrink_picture(sample.encoded, side_px=config.image_side_px, quality=config.quality)
    except DataError as error:
        return LeftOut(key, error.cause, is_bad=True)
    problem = picture_problem(small.original_width, small.original_height, clean)
    if problem:
        return LeftOut(key, problem, is_bad=False)
    return Pair(
        key=key,
        part=record.part,
        captions=captions,
        jpeg=small.jpeg,
        width=small.width,
        height=small.height,
        original_width=small.original_width,
        original_height=small.original_height,
        picture_hash=hash64(sample.encoded) if clean.duplicates != "keep" else 0,
        looks_hash=perceptual_hash(small.pixels) if clean.needs_perceptual_hash else 0,
    )
