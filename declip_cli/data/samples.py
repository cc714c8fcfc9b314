"""One image-text pair as bytes and words, and what a store of pairs is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

UNREAD = "unreadable"
"""Cause of a pair that the disk or the network did not give this time; it may be sound and is asked for again."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One pair as it lies in the store: nothing decoded, nothing drawn."""

    key: str
    """Unique in its store; what error messages name."""
    image: bytes
    """The encoded picture."""
    captions: tuple[str, ...]
    """At least one; the loader draws one per epoch."""


class SampleStore(Protocol):
    """Pairs in a fixed order, read by number from several threads at once."""

    @property
    def fingerprint(self) -> str:
        """Sha256 that changes when the pairs or their order change."""
        ...

    @property
    def skipped(self) -> Mapping[str, tuple[int, str]]:
        """What is in the files but in no pair: cause → (count, first key)."""
        ...

    def __len__(self) -> int: ...

    def read(self, number: int) -> RawSample:
        """Read one pair.

        Args:
            number: from 0 to `len(self) - 1`.

        Returns:
            The pair.

        Raises:
            DataError: this pair cannot be read; `.cause` says why in a few words, `UNREAD` if that may pass.
            IndexError: there is no such number.
        """
        ...
