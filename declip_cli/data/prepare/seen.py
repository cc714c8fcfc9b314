"""What a run of `prepare` has seen: keys, captions, pictures and their looks."""

from array import array
from dataclasses import replace

import faiss
import numpy as np
from numpy.typing import NDArray

from declip_cli.data.prepare.config import CleanConfig
from declip_cli.data.prepare.hashes import HashCounter, hash64
from declip_cli.data.prepare.stages import LeftOut, Pair

DUPLICATE_KEY, EXACT, NEAR = "duplicate key", "duplicate picture", "near-duplicate picture"
REPEATED, EXCLUDED = "repeated caption", "excluded picture"
_NUM_BANDS, _BAND_BITS, _NUM_FLIPS = 3, 21, 1  # finds every hash within 5 bits


class Looks:
    """Perceptual hashes, asked for the ones near another; about 200 bytes a hash.

    Two hashes of 64 bits that differ in at most 5 differ in at most one within one of three bands of 21.
    """

    def __init__(self) -> None:
        self._index = faiss.IndexBinaryMultiHash(64, _NUM_BANDS, _BAND_BITS)
        self._index.nflip = _NUM_FLIPS

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, looks_hash: int) -> None:
        """Add a hash; 0, a picture without structure, is left out."""
        if looks_hash:
            self._index.add(_as_row(looks_hash))

    def has_near(self, looks_hash: int, distance_bits: int) -> bool:
        """Say whether a hash within a distance has been added.

        Args:
            looks_hash: of `clean.perceptual_hash`.
            distance_bits: at most 5.

        Returns:
            False for a picture without structure.
        """
        if not looks_hash or not len(self):
            return False
        limits, _, _ = self._index.range_search(_as_row(looks_hash), distance_bits + 1)
        return int(limits[-1]) > 0


def _as_row(looks_hash: int) -> NDArray[np.uint8]:
    return np.frombuffer(looks_hash.to_bytes(8, "big"), dtype=np.uint8)[None]


class Seen:
    """Leave out what repeats what came before, in the order of the source.

    Args:
        config: the filters.
        excluded: looks of evaluation images.
    """

    def __init__(self, config: CleanConfig, excluded: Looks) -> None:
        self._config, self._excluded = config, excluded
        self._counter, self._looks = HashCounter(), Looks()
        self._log = array("Q")

    def check(self, pair: Pair) -> Pair | LeftOut:
        """Take a pair in, unless it repeats another or an excluded one.

        Args:
            pair: the next one.

        Returns:
            The pair, perhaps with fewer captions, or why it is left out.
        """
        config = self._config
        key_hash = _hash("key", "\0".join((pair.key, *pair.captions)))
        if self._counter.count(key_hash):
            return LeftOut(pair.key, DUPLICATE_KEY, is_bad=True)
        problem, captions, most = self._image_problem(pair), pair.captions, config.max_caption_repeats
        if most is not None:
            captions = tuple(text for text in captions if self._counter.count(_caption_hash(text)) < most)
        if problem or not captions:
            return LeftOut(pair.key, problem or REPEATED, is_bad=False)
        self._add(key_hash)
        if config.duplicates != "keep":
            self._add(pair.picture_hash)
        if config.duplicates == "near":
            self._add(pair.looks_hash, is_looks=True)
        if most is not None:
            for caption in captions:
                self._add(_caption_hash(caption))
        return replace(pair, captions=captions)

    def _image_problem(self, pair: Pair) -> str:
        config = self._config
        if config.duplicates != "keep" and self._counter.count(pair.picture_hash):
            return EXACT
        if self._excluded.has_near(pair.looks_hash, config.near_distance_bits):
            return EXCLUDED
        if config.duplicates == "near" and self._looks.has_near(pair.looks_hash, config.near_distance_bits):
            return NEAR
        return ""

    def _add(self, hashed: int, *, is_looks: bool = False) -> None:
        self._log.extend((is_looks, hashed))
        (self._looks if is_looks else self._counter).add(hashed)

    def new_bytes(self) -> bytes:
        """Return what was taken in since this was last asked, to be kept on disk."""
        data = self._log.tobytes()
        self._log = array("Q")
        return data

    def restore(self, data: bytes) -> None:
        """Take in what an interrupted run had seen.

        Args:
            data: all that `new_bytes` returned, joined.
        """
        words = array("Q", data)
        for is_looks, hashed in zip(words[::2], words[1::2], strict=True):
            (self._looks if is_looks else self._counter).add(hashed)


def _hash(kind: str, text: str) -> int:
    return hash64(f"{kind}\0{text}".encode())


def _caption_hash(caption: str) -> int:
    return _hash("caption", " ".join(caption.casefold().split()))
