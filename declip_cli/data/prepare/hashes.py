"""Seen or not, for tens of millions of keys: 64-bit hashes in flat memory."""

import hashlib
from array import array

_MIN_SLOTS = 1 << 12


def hash64(data: bytes) -> int:
    """Hash bytes to 64 bits, the same on every machine and in every run; never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class HashCounter:
    """Count how often each hash came; 18 to 36 bytes a hash, whatever its key was.

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

    def add(self, hashed: int) -> int:
        """Add a hash.

        Args:
            hashed: from 1 to 2⁶⁴ - 1.

        Returns:
            How often it had been added before.
        """
        slot = self._slot(hashed)
        before = self._counts[slot]
        self._counts[slot] = before + 1
        if not before:
            self._hashes[slot] = hashed
            self._num += 1
            if self._num * 3 > len(self._hashes) * 2:
                self._grow()
        return before

    def _slot(self, hashed: int) -> int:
        mask = len(self._hashes) - 1
        slot = hashed & mask
        while self._hashes[slot] and self._hashes[slot] != hashed:
            slot = (slot + 1) & mask
        return slot

    def _resize(self, num_slots: int) -> None:
        self._hashes = array("Q", bytes(8 * num_slots))
        self._counts = array("I", bytes(4 * num_slots))

    def _grow(self) -> None:
        hashes, counts = self._hashes, self._counts
        self._resize(2 * len(hashes))
        for hashed, count in zip(hashes, counts, strict=True):
            if hashed:
                slot = self._slot(hashed)
                self._hashes[slot] = hashed
                self._counts[slot] = count
