"""One image-text pair as bytes and words, and the stores that hand pairs out by number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from declip_cli.errors import DataError


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
            DataError: this pair cannot be read; `.cause` says why in a few words.
            IndexError: there is no such number.
        """
        ...


def open_samples(paths: Sequence[str], *, part: str = "", cache_dir: str = "") -> SampleStore:
    """Open the pairs that `--data` names.

    Args:
        paths: folders made by `declip prepare`, tar files or patterns such as `cc3m/{00000..00331}.tar`,
            fsspec URLs of these, or the single word `demo`.
        part: named part of the data: `train`, `fit`, `validation` or `test` of the demo corpus; otherwise the
            name given to `declip prepare --split`. Empty is the training part.
        cache_dir: where remote shards and the indexes of write-protected folders are kept; empty uses
            `$DECLIP_CACHE`, else `~/.cache/declip`.

    Returns:
        All pairs of all paths as one store, in the order given.

    Raises:
        DataError: a path is missing, is not readable as shards, or holds no pair.
    """
    if not paths:
        raise DataError("no data given", remedy="--data SHARDS, or --data demo for the pairs that come along")
    if "demo" in paths:
        return _open_demo(paths, part)
    from declip_cli.data.shards import open_shards

    return open_shards(paths, part=part, cache_dir=cache_dir)


def _open_demo(paths: Sequence[str], part: str) -> SampleStore:
    if len(paths) > 1:
        raise DataError(
            f"demo cannot be joined with other data (got {', '.join(paths)})",
            remedy="declip prepare the demo pictures first, or leave demo away",
        )
    from declip_cli.data.demo import demo_samples

    return demo_samples(part)
