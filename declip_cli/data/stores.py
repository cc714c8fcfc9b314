"""Open the pairs that the user names: prepared shards, foreign tars or the demo corpus."""

from collections.abc import Sequence
from typing import Any, cast

from declip_cli.data.dataset import Dataset, Example, Skips
from declip_cli.data.demo import demo_samples
from declip_cli.data.samples import SampleStore
from declip_cli.data.shards.indexing import Say
from declip_cli.data.shards.store import open_shards
from declip_cli.errors import DataError


def open_samples(
    paths: Sequence[str],
    *,
    part: str | None = None,
    cache_dir: str | None = None,
    say: Say | None = None,
    together: bool = True,
) -> SampleStore:
    """Open the pairs that `--data` names.

    Args:
        paths: folders made by `declip prepare`, tar files or patterns such as `cc3m/{00000..00331}.tar`,
            fsspec URLs of these, or the single word `demo`.
        part: named part of the data: `train`, `fit`, `validation` or `test` of the demo corpus; otherwise the
            name given to `declip prepare --split`. None is the training part.
        cache_dir: where remote shards and the indexes of write-protected folders are kept; None uses
            `$DECLIP_CACHE`, else `~/.cache/declip`.
        say: told of damaged indexes, and of the progress where shards of others are indexed for the first time.
        together: if there is a process group, every rank opens the same data now, and they share that work; false
            for a rank that opens data alone.

    Returns:
        All pairs of all paths as one store, in the order given.

    Raises:
        DataError: a path is missing, is not readable as shards, or holds no pair.
    """
    if not paths:
        raise DataError("no data given", remedy="--data SHARDS, or --data demo for the pairs that come along")
    if "demo" in paths:
        return _open_demo(paths, part or "")
    data = open_shards(paths, split=part, cache_dir=cache_dir, say=say, together=together)
    return cast(SampleStore, data)


def _open_demo(paths: Sequence[str], part: str) -> SampleStore:
    if len(paths) > 1:
        raise DataError(
            f"demo cannot be joined with other data (got {', '.join(paths)})",
            remedy="declip prepare the demo pictures first, or leave demo away",
        )
    return demo_samples(part)


def open_pairs(paths: Sequence[str], *, part: str | None, cache_dir: str | None, say: Say) -> Dataset:
    """Open the pairs to train on; see `open_samples`."""
    opened: Any = open_samples(paths, part=part, cache_dir=cache_dir, say=say)
    return opened if isinstance(opened, Dataset) else _Pairs(opened)


class _Pairs(Dataset):
    """A store as a data set."""

    def __init__(self, store: SampleStore) -> None:
        self._store, self.skipped = store, Skips(store.skipped)

    @property
    def fingerprint(self) -> str:
        """See `Dataset`."""
        return self._store.fingerprint

    def __len__(self) -> int:
        return len(self._store)

    def read(self, number: int) -> Example:
        """See `Dataset`."""
        sample = self._store.read(number)
        return Example(sample.key, sample.image, sample.captions)

    def key(self, number: int) -> str:
        """See `Dataset`."""
        return self._store.read(number).key
