"""Seen or not, for tens of millions of keys and images: 64-bit hashes in flat memory."""

import hashlib
from array import array

import faiss
import numpy as np
from numpy.typing import NDArray

_MIN_SLOTS = 1 << 12
_NUM_BANDS, _BAND_BITS, _NUM_FLIPS = 3, 21, 1  # finds every hash within 5 bits


def hash64(data: bytes) -> int:
    """Hash bytes to 64 bits, the same on every machine and in every run; never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class HashCounter:
    """Count how often each hash, from 1 to 2⁶⁴ - 1, came; 18 to 36 bytes a hash, whatever its key was.

    Two different keys are taken for one with probability n²/2⁶⁵: one in ten thousand for 50 million keys.
    """

    def __init__(self) -> None:
        self._resize(_MIN_SLOTS)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def count(self, hashed: int) -> int:
        """Return how often a hash has been added."""
        return self._counts[self._slot(hashed)]

    def add(self, hashed: int) -> None:
        """Add a hash."""
        slot = self._slot(hashed)
        self._counts[slot] += 1
        if self._hashes[slot]:
            return
        self._hashes[slot] = hashed
        self._num += 1
        if self._num * 3 > len(self._hashes) * 2:
            hashes, counts = self._hashes, self._counts
            self._resize(2 * len(hashes))
            for old, count in zip(hashes, counts, strict=True):
                if old:
                    slot = self._slot(old)
                    self._hashes[slot], self._counts[slot] = old, count

    def _slot(self, hashed: int) -> int:
        mask = len(self._hashes) - 1
        slot = hashed & mask
        while self._hashes[slot] and self._hashes[slot] != hashed:
            slot = (slot + 1) & mask
        return slot

    def _resize(self, num_slots: int) -> None:
        self._hashes = array("Q", bytes(8 * num_slots))
        self._counts = array("I", bytes(4 * num_slots))


class PhashIndex:
    """Perceptual hashes, asked for the ones near another; about 200 bytes a hash.

    Two hashes of 64 bits that differ in at most 5 differ in at most one within one of three bands of 21.
    """

    def __init__(self) -> None:
        self._index = faiss.IndexBinaryMultiHash(64, _NUM_BANDS, _BAND_BITS)
        self._index.nflip = _NUM_FLIPS

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, phash: int) -> None:
        """Add a hash; 0, an image without structure, is left out."""
        if phash:
            self._index.add(_as_row(phash))

    def has_near(self, phash: int, distance_bits: int) -> bool:
        """Return whether a hash within a distance, at most 5 bits, has been added; never for 0."""
        if not phash or not len(self):
            return False
        limits, _, _ = self._index.range_search(_as_row(phash), distance_bits + 1)
        return int(limits[-1]) > 0


def _as_row(phash: int) -> NDArray[np.uint8]:
    return np.frombuffer(phash.to_bytes(8, "big"), dtype=np.uint8)[None]
