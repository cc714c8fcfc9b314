"""Image-text pairs in tar shards, read by number, alone or by the block."""

import functools
import hashlib
import os
import threading
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_cli.data import storage
from declip_cli.data.dataset import ROW_BITS, BlockDataset, Example, Skips
from declip_cli.data.shards.files import Piece, Shard, ShardFiles
from declip_cli.data.shards.index import ShardIndex, read_indexes
from declip_cli.data.shards.indexing import find_or_make_index
from declip_cli.data.shards.tar_samples import read_captions
from declip_cli.files import parse_json

BLOCK_BYTES = 8 << 20
"""Size of the blocks of shards that are read in one piece, about."""
_MAX_GAP_BYTES = 64 << 10
_MAX_BLOCK_FACTOR = 8
_MAX_PIECES = 4096
_MAX_OPEN = 128
_NUM_STATS = 16
_FACTS = ("name", "split", "note", "classes", "labels", "fold_size")


class Shards(BlockDataset):
    """What all data sets in shards have in common: how a sample and a block are read."""

    def __init__(self, shards: Sequence[Shard], files: ShardFiles, *more: object) -> None:
        self._shards, self._files, self._arguments = shards, files, (shards, files, *more)
        self.is_remote = any(shard.is_remote for shard in shards)
        self.skipped = Skips()
        self._piece = functools.lru_cache(_MAX_PIECES)(self._find_piece)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments, {name: getattr(self, name) for name in _FACTS}

    @abstractmethod
    def _find_piece(self, block: int) -> Piece:
        """Find the bytes of a block."""

    @abstractmethod
    def _locate(self, index: int) -> tuple[int, ShardIndex, int]:
        """Find a sample: its block, the index of its shard, its row there."""

    def fetch(self, block: int) -> None:
        """See `BlockDataset.fetch`.

        A remote block goes to the cache of the machine, which all processes share; where that has no room for it,
        its samples are fetched one by one when they are read. A local one goes to the page cache.
        """
        self._files.fetch(self._piece(block))

    def release(self, block: int) -> None:
        """See `BlockDataset.release`; a block of the cache is the first to go where that is full."""
        self._files.release(self._piece(block))

    def read(self, index: int) -> Example:
        """Read one pair, in one request unless captions and image lie far apart; see `Dataset.read`."""
        block, shard_index, row = self._locate(index)
        piece = self._piece(block)
        first, last = shard_index.image_span(row)
        start, end, is_json = shard_index.caption_span(row)
        low, high = min(first, start), max(last, end)
        if high - low <= last - first + end - start + _MAX_GAP_BYTES:
            data = self._files.read(piece, low, high)
            image, text = data[first - low : last - low], data[start - low : end - low]
        else:
            image, text = self._files.read(piece, first, last), self._files.read(piece, start, end)
        key = shard_index.key(row)
        return Example(key, image, read_captions(text, key, is_json=is_json))

    def key(self, index: int) -> str:
        """Return the key of a pair, which stands in the index."""
        _, shard_index, row = self._locate(index)
        return shard_index.key(row)

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of a pair; see `Dataset.captions`."""
        block, shard_index, row = self._locate(index)
        start, end, is_json = shard_index.caption_span(row)
        return read_captions(self._files.read(self._piece(block), start, end), shard_index.key(row), is_json=is_json)


class ShardDataset(Shards):
    """The pairs of indexed shards as one sequence; nothing is held in memory per pair, and the index is mapped.

    Args:
        shards: in order.
        files: reads them.
        index_files: local files whose indexes are those of the shards, in order.
    """

    def __init__(self, shards: Sequence[Shard], files: ShardFiles, index_files: Sequence[str]) -> None:
        super().__init__(shards, files, index_files)
        self._indexes = [index for path in index_files for index in read_indexes(path, check=False)]
        for index in self._indexes:
            self.skipped.add_all(index.skipped)
        self._firsts = [0, *accumulate(len(index) for index in self._indexes)]
        self.block_firsts: NDArray[np.int64] = self._cut()
        self.num_blocks = len(self.block_firsts) - 1

    def _cut(self) -> NDArray[np.int64]:
        """Cut each shard into blocks of equally many samples."""
        firsts = [np.zeros(0, np.int64)]
        for first, index in zip(self._firsts, self._indexes, strict=False):
            num = min(len(index), -(-index.tar_bytes // BLOCK_BYTES))
            firsts.append(first + np.arange(num, dtype=np.int64) * len(index) // max(1, num))
        return np.concatenate([*firsts, [len(self)]]).astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of what is in the shards, and their order."""
        digest = hashlib.sha256()
        for shard, index in zip(self._shards, self._indexes, strict=True):
            digest.update(f"{index.name}\0{shard.sha256}\0{index.tar_bytes}\0{index.digest}\0".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._firsts[-1]

    def count(self, block: int) -> int:
        """See `BlockDataset.count`."""
        return int(self.block_firsts[block + 1] - self.block_firsts[block])

    def fetch(self, block: int) -> None:
        """See `Shards.fetch`; a block with something large between its samples is left where it is."""
        piece = self._piece(block)
        if piece.end - piece.start <= _MAX_BLOCK_FACTOR * BLOCK_BYTES:
            self._files.fetch(piece)

    def _locate(self, index: int) -> tuple[int, ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._firsts, index) - 1
        return bisect_right(self.block_firsts, index) - 1, self._indexes[shard], index - self._firsts[shard]

    def _find_piece(self, block: int) -> Piece:
        first, end = self.block_firsts[block : block + 2].tolist()
        shard = bisect_right(self._firsts, first) - 1
        begin = self._firsts[shard]
        return Piece(self._shards[shard], *self._indexes[shard].span(first - begin, end - 1 - begin))


class LazyShardDataset(Shards):
    """The pairs of archives that nobody has indexed, each of which is a block and is indexed when its turn comes.

    How many pairs there are in all is known when every archive has been there once; `len` is an estimate.

    Args:
        shards: in order.
        files: reads them.
    """

    def __init__(self, shards: Sequence[Shard], files: ShardFiles) -> None:
        super().__init__(shards, files)
        self.num_blocks, self.block_firsts = len(shards), None
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._index = functools.lru_cache(_MAX_OPEN)(self._open_index)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of names and sizes of the shards, and their order."""
        text = "".join(f"{os.path.basename(shard.path)}\0{shard.num_bytes}\0" for shard in self._shards)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return self._estimated_len

    @functools.cached_property
    def _estimated_len(self) -> int:
        """Judge by what img2dataset wrote beside its shards, else by the first shard."""
        some = self._shards[:: max(1, self.num_blocks // _NUM_STATS)]
        known = [(shard.num_bytes, _successes(shard)) for shard in some]
        known = [(size, pairs) for size, pairs in known if pairs]
        if not known:  # the first may be damaged
            counts = ((shard.num_bytes, self.count(block)) for block, shard in enumerate(self._shards))
            known = [next((pair for pair in counts if pair[1]), (1, 0))]
        sizes, pairs = (sum(column) for column in zip(*known, strict=True))
        return int(sum(shard.num_bytes for shard in self._shards) * pairs / max(1, sizes))

    def count(self, block: int) -> int:
        """See `BlockDataset.count`; an archive without an index is fetched, and its index kept."""
        if block not in self._counts:
            index = self._index(block)
            with self._lock:
                if block not in self._counts:
                    self.skipped.add_all(index.skipped)
                    self._counts[block] = len(index)
        return self._counts[block]

    def fetch(self, block: int) -> None:
        """See `Shards.fetch`; indexes the archive if need be."""
        super().fetch(block)
        self.count(block)

    def _locate(self, index: int) -> tuple[int, ShardIndex, int]:
        block, row = index >> ROW_BITS, index & ((1 << ROW_BITS) - 1)
        if not 0 <= block < self.num_blocks or row >= self.count(block):
            raise IndexError(index)
        return block, self._index(block), row

    def _find_piece(self, block: int) -> Piece:
        return Piece(self._shards[block], 0, self._shards[block].num_bytes)

    def _open_index(self, block: int) -> ShardIndex:
        path, _ = find_or_make_index(self._shards[block], self._files, fetches=True)
        (index,) = read_indexes(path, check=False)
        return index


def _successes(shard: Shard) -> int:
    """Read how many images img2dataset says are in a shard; 0 if it says nothing."""
    try:
        stats = parse_json(storage.read_bytes(shard.path.removesuffix(".tar") + "_stats.json"))
        return int(stats["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
