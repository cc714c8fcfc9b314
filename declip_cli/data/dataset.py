"""What every data set is to the rest of the program: examples by number, and what was skipped on the way."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from declip_cli.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]
"""RGB, upright, (height, width, 3)."""
Metric: TypeAlias = Literal["accuracy", "mean_per_class"]
ROW_BITS = 32
"""Bits of the row in the number of an example whose block is not counted yet; the block stands above them."""
UNREAD = "unreadable"
"""Cause of an example that the disk or the network did not give this time; it may be sound and is asked for again."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image with what is known about it; nothing decoded that was not, nothing drawn."""

    key: str
    """Unique in its data set; what messages name. A path where the image is a file."""
    image: bytes | Pixels
    """The encoded file, or pixels where the data set holds nothing else."""
    captions: tuple[str, ...] = ()
    label: int = -1
    """The number of its class, -1 if it has none."""

    @property
    def encoded(self) -> bytes:
        """The image where it is an encoded file, as it is in shards and in the sources of `prepare`."""
        if not isinstance(self.image, bytes):
            raise TypeError(f"{self.key} holds pixels")
        return self.image


class Skips(dict[str, tuple[int, str]]):
    """What could not be used: cause → (count, key of the first)."""

    def add(self, cause: str, key: str, *, count: int = 1) -> None:
        """Count one more under a cause."""
        before, first = self.get(cause, (0, key))
        self[cause] = (before + count, first)

    def add_all(self, more: Mapping[str, tuple[int, str]]) -> None:
        """Add the counts of another, keeping the first key of each cause."""
        for cause, (count, first) in more.items():
            self.add(cause, first, count=count)

    @property
    def num(self) -> int:
        """How many were skipped in all."""
        return sum(count for count, _ in self.values())

    def to_json(self) -> dict[str, dict[str, int | str]]:
        """Return cause → `count`, `first`, as reports hold it."""
        return {cause: {"count": count, "first": first} for cause, (count, first) in self.items()}

    def __str__(self) -> str:
        return "; ".join(f"{cause}: {count}, first {first}" for cause, (count, first) in self.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """The classes of a data set for classification, and how papers score it."""

    names: tuple[str, ...]
    """C names as they appear in a prompt; the label is the position."""
    templates: tuple[str, ...] = ()
    """The set's own prompts, with {} where the class name goes."""
    metric: Metric = "accuracy"


class Dataset(ABC):
    """Examples in a fixed order, read by number from several threads at once.

    Keys, captions and labels are had without reading an image.
    """

    name: str = ""
    """As the user typed it."""
    split: str = ""
    """Empty where the data are not divided."""
    note: str = ""
    """What a reader of a score should know, such as a split of our own."""
    classes: Classes | None = None
    """None where the examples have no labels."""
    labels: Sequence[int] = ()
    """The class of each example, N numbers in [0, C), -1 for one in no class; empty without classes."""
    fold_size: int = 0
    """Images per fold, where retrieval is also scored in folds; else 0."""
    skipped: Skips
    """What is in the files but in no example."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 that changes when the examples or their order change."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Example:
        """Read one example with its image.

        Args:
            index: from 0 to `len(self) - 1`.

        Returns:
            The example.

        Raises:
            DataError: it cannot be read; `.cause` says why in a few words, `UNREAD` if that may pass.
            IndexError: there is no such number.
        """

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the key of one example without reading its image; errors as in `read`."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one example without reading its image; errors as in `read`."""
        return ()

    def stamp(self, index: int) -> str:
        """Return what changes when an image may have changed, and is had without reading it; empty if unknown."""
        return f"{self.fingerprint}:{index}"

    def named(self, index: int) -> str:
        """Return the key of one example for a message, or its number where the key cannot be read."""
        try:
            return self.key(index)
        except DataError:
            return f"number {index}"


class BlockDataset(Dataset):
    """Examples that lie together in blocks, each of which can be fetched in one piece ahead of its use.

    It can be pickled; opened so in another process of this machine, it does not ask the store again.
    """

    is_remote: bool
    """Whether any block has to be fetched from a store."""
    num_blocks: int
    block_firsts: NDArray[np.int64] | None
    """Numbers of the examples at which blocks begin, and the number of examples, (blocks + 1,). None where blocks
    are counted when their turn comes: a number is `block << ROW_BITS | row` there, and `len` an estimate."""

    @abstractmethod
    def count(self, block: int) -> int:
        """Return how many examples are in a block; errors as in `fetch`."""

    @abstractmethod
    def fetch(self, block: int) -> None:
        """Bring a block near, so that `read` need not wait.

        Raises:
            DataError: the disk or the store did not give it; the cause is `UNREAD`.
        """

    @abstractmethod
    def release(self, block: int) -> None:
        """Mark a block as not needed soon."""
