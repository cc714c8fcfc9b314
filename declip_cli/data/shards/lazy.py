"""Archives that nobody has indexed, of which training can start at once: each is indexed when its turn comes."""

import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from declip_cli.data import storage
from declip_cli.data.dataset import ROW_BITS, Skips
from declip_cli.data.shards.block_cache import locked
from declip_cli.data.shards.dataset import Shards
from declip_cli.data.shards.files import Piece, Shard, ShardFiles
from declip_cli.data.shards.index import ShardIndex, read_indexes
from declip_cli.data.shards.indexing import find_index, make_index, place_in_cache
from declip_cli.data.shards.store import CACHE_GB, default_cache_dir, find_shards
from declip_cli.files import parse_json

_MAX_OPEN = 128
_NUM_STATS = 16


class LazyShardDataset(Shards):
    """The pairs of archives that are read whole, one after the other, in any order.

    A sample's number is `shard << 32 | row`, with `row < count(shard)`. How many there are in all is known when every
    shard has been there once; `len` is an estimate.

    Args:
        shards: in order.
        cache_dir: local folder for indexes and for what is fetched.
        cache_bytes: how much may be fetched at a time.
        name: as the user typed it.
    """

    def __init__(self, shards: Sequence[Shard], *, cache_dir: str, cache_bytes: int, name: str = "") -> None:
        super().__init__(shards, ShardFiles(cache_dir, cache_bytes=cache_bytes))
        facts: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": cache_bytes, "name": name}
        self._reopen = functools.partial(LazyShardDataset, shards, **facts)
        self.name, self._cache_dir, self.skipped = name, cache_dir, Skips()
        self.num_blocks, self.block_firsts = len(shards), None
        self._counts: dict[int, int] = {}
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of names and sizes of the shards, and their order."""
        text = "".join(f"{os.path.basename(shard.path)}\0{shard.num_bytes}\0" for shard in self._shards)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return self.estimated_len

    @functools.cached_property
    def estimated_len(self) -> int:
        """How many pairs there are, from what img2dataset wrote beside its shards, else from the first shard."""
        step = max(1, self.num_blocks // _NUM_STATS)
        known = [(shard.num_bytes, _successes(shard)) for shard in self._shards[::step]]
        known = [(size, pairs) for size, pairs in known if pairs]
        if not known:  # the first may be damaged
            counts = ((self._shards[shard].num_bytes, self.count(shard)) for shard in range(self.num_blocks))
            known = [next((pair for pair in counts if pair[1]), (1, 0))]
        sizes, pairs = (sum(column) for column in zip(*known, strict=True))
        return int(sum(shard.num_bytes for shard in self._shards) * pairs / max(1, sizes))

    def count(self, shard: int) -> int:
        """Return the number of pairs of a shard; one without an index is fetched, and its index kept.

        Args:
            shard: position, from 0 to `num_blocks - 1`.

        Returns:
            How many there are, perhaps none.

        Raises:
            DataError: it cannot be read; the cause is `UNREAD`.
        """
        if shard not in self._counts:
            index = self._index(shard)
            with self._lock:
                if shard not in self._counts:
                    self.skipped.add_all(index.skipped)
                    self._counts[shard] = len(index)
        return self._counts[shard]

    def fetch(self, shard: int) -> None:
        """Bring a whole shard near, in parts of 16 MiB, and index it if need be; see `ShardDataset.fetch`."""
        self._files.fetch(_whole(self._shards[shard]))
        self.count(shard)

    def release(self, shard: int) -> None:
        """Say that a shard will not be needed soon."""
        self._files.release(_whole(self._shards[shard]))

    def _locate(self, number: int) -> tuple[Piece, ShardIndex, int]:
        shard, row = number >> ROW_BITS, number & ((1 << ROW_BITS) - 1)
        if not 0 <= shard < self.num_blocks or row >= self.count(shard):
            raise IndexError(number)
        return _whole(self._shards[shard]), self._index(shard), row

    def _index(self, number: int) -> ShardIndex:
        with self._lock:
            if number in self._indexes:
                self._indexes.move_to_end(number)
                return self._indexes[number]
        shard = self._shards[number]
        with locked(f"{place_in_cache(shard, self._cache_dir)}.lock"):  # others of the machine wait, and find it
            path, _ = find_index(shard, cache_dir=self._cache_dir)
            if not path:
                self._files.fetch(_whole(shard))
                path = make_index(shard, self._files, cache_dir=self._cache_dir)
        (index,) = read_indexes(path, check=False)
        with self._lock:
            self._indexes[number] = index
            if len(self._indexes) > _MAX_OPEN:
                self._indexes.popitem(last=False)
        return index


@functools.lru_cache(_MAX_OPEN)
def _whole(shard: Shard) -> Piece:
    return Piece(shard, 0, shard.num_bytes)


def _successes(shard: Shard) -> int:
    """Read how many images img2dataset says are in a shard; 0 if it says nothing."""
    try:
        stats = parse_json(storage.read_bytes(shard.path.removesuffix(".tar") + "_stats.json"))
        return int(stats["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def open_lazy_shards(
    paths: Sequence[str], *, cache_dir: str | None = None, cache_gb: float = CACHE_GB
) -> LazyShardDataset:
    """Open archives of others without going through them; arguments and errors as of `open_shards`."""
    shards = [shard for path in paths for shard in find_shards(path, cache_dir=cache_dir)]
    cache_dir, cache_bytes = cache_dir or default_cache_dir(), int(cache_gb * 1e9)
    return LazyShardDataset(shards, cache_dir=cache_dir, cache_bytes=cache_bytes, name=" ".join(paths))


def lack_indexes(paths: Sequence[str], *, cache_dir: str | None = None) -> bool:
    """Say whether opening these paths by `open_shards` means going through archives first; errors as there."""
    folder = cache_dir or default_cache_dir()
    return any(
        not shard.sha256 and not shard.has_index and not find_index(shard, cache_dir=folder)[0]
        for path in paths
        for shard in find_shards(path, cache_dir=folder)
    )
