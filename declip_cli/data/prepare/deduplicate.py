"""Omit duplicates (keys, captions, images and their near copies) and copies of evaluation images."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import UNREAD, Dataset
from declip_cli.data.prepare.config import CleanConfig
from declip_cli.data.prepare.executors import run_in_threads
from declip_cli.data.prepare.hashes import HashCounter, PhashIndex, hash64
from declip_cli.data.prepare.images import decode_for_phash, perceptual_hash
from declip_cli.data.prepare.process import Pair
from declip_cli.data.sources.records import Rejected
from declip_cli.errors import DataError

_NEAR_BITS = 4
"""Bits of 64 in which the perceptual hashes of look-alikes may differ; 4 finds 98 % of photographs that were encoded
again at quality 50, and not those that were cropped."""


class Deduplicator:
    """Reject pairs that repeat earlier ones, in the order of the source.

    Args:
        config: the filters.
        excluded: perceptual hashes of evaluation images.
    """

    def __init__(self, config: CleanConfig, excluded: PhashIndex) -> None:
        self._config, self._excluded = config, excluded
        self._counter, self._phashes = HashCounter(), PhashIndex()
        self._log = array("Q")

    def check(self, pair: Pair) -> Pair | Rejected:
        """Accept a pair unless it repeats another or an excluded one; return it, perhaps with fewer captions."""
        config = self._config
        key_hash = _hash("key", "\0".join((pair.key, *pair.captions)))
        if self._counter.count(key_hash):
            return Rejected(pair.key, "duplicate key")
        problem, captions, most = self._image_problem(pair), pair.captions, config.max_caption_repeats
        if most is not None:
            captions = tuple(text for text in captions if self._counter.count(_caption_hash(text)) < most)
        if problem or not captions:
            return Rejected(pair.key, problem or "repeated caption", is_bad=False)
        self._add(key_hash)
        if config.duplicates != "keep":
            self._add(pair.image_hash)
        if config.duplicates == "near":
            self._add(pair.phash, is_phash=True)
        if most is None:
            return pair
        for caption in captions:
            self._add(_caption_hash(caption))
        return replace(pair, captions=captions)

    def _image_problem(self, pair: Pair) -> str:
        duplicates = self._config.duplicates
        if duplicates != "keep" and self._counter.count(pair.image_hash):
            return "duplicate image"
        if self._excluded.has_near(pair.phash, _NEAR_BITS):
            return "excluded image"
        is_near = duplicates == "near" and self._phashes.has_near(pair.phash, _NEAR_BITS)
        return "near-duplicate image" if is_near else ""

    def _add(self, hashed: int, *, is_phash: bool = False) -> None:
        self._log.extend((is_phash, hashed))
        (self._phashes if is_phash else self._counter).add(hashed)

    def new_bytes(self) -> bytes:
        """Return what was added since the last call, to be stored on disk."""
        data = self._log.tobytes()
        self._log = array("Q")
        return data

    def restore(self, data: bytes) -> None:
        """Restore what an interrupted run had seen: all that `new_bytes` returned, joined."""
        words = array("Q", data)
        for is_phash, hashed in zip(words[::2], words[1::2], strict=True):
            (self._phashes if is_phash else self._counter).add(hashed)


def _hash(kind: str, text: str) -> int:
    return hash64(f"{kind}\0{text}".encode())


def _caption_hash(caption: str) -> int:
    return _hash("caption", " ".join(caption.casefold().split()))


def hash_images(names: Sequence[str], *, workers: int = 0) -> tuple[PhashIndex, dict[str, int]]:
    """Compute the perceptual hashes of all images of some data sets.

    Args:
        names: folders of images or of shards, local or URLs, or known sets, as `open_dataset` takes them.
        workers: threads; 0 uses all available cores.

    Returns:
        Their looks, and `num_images` and `num_unreadable` for the manifest.

    Raises:
        DataError: one is missing, holds no image, or cannot be read for now.
    """
    phashes, counts = PhashIndex(), {"num_images": 0, "num_unreadable": 0}
    for name in names:
        try:
            data = open_dataset(name)
            hashes = list(run_in_threads(partial(_phashes_of, data), range(len(data)), workers=workers))
        except DataError as error:
            raise DataError(f"cannot exclude {name}: {error.message}", remedy="check --exclude") from error
        if max(hashes, default=-1) < 0:
            raise DataError(f"no image to exclude in {name}", remedy="check --exclude")
        counts["num_images"] += len(hashes)
        counts["num_unreadable"] += hashes.count(-1)
        for phash in hashes:
            phashes.add(max(phash, 0))
    return phashes, counts


def _phashes_of(data: Dataset, indices: Sequence[int]) -> list[int]:
    """Return the perceptual hash of each image, -1 for a damaged one."""
    hashes = []
    for index in indices:
        try:
            image = data.read(index).image
            hashes.append(perceptual_hash(decode_for_phash(image) if isinstance(image, bytes) else image))
        except DataError as error:
            if error.cause == UNREAD:
                raise
            hashes.append(-1)
    return hashes
