"""Image-text pairs in tar shards, read by number, alone or by the block."""

import functools
import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.dataset import BlockDataset, Example, Skips
from declip_cli.data.shards.files import Piece, Shard, ShardFiles
from declip_cli.data.shards.index import ShardIndex, read_indexes
from declip_cli.data.shards.tar_samples import read_captions, read_metadata

BLOCK_BYTES = 8 << 20
"""Size of the blocks of shards that are read in one piece, about."""
_MAX_GAP_BYTES = 64 << 10
_MAX_BLOCK_FACTOR = 8
_MAX_PIECES = 4096
_FACTS = ("name", "split", "note", "classes", "labels", "fold_size")


class Shards(BlockDataset):
    """What all data sets in shards have in common: how one sample is read."""

    def __init__(self, shards: Sequence[Shard], files: ShardFiles) -> None:
        self._shards, self._files = shards, files
        self.is_remote = any(shard.is_remote for shard in shards)

    @abstractmethod
    def _locate(self, number: int) -> tuple[Piece, ShardIndex, int]:
        """Find a sample: the piece of a shard that it is fetched with, the index of that shard, its row there."""

    _reopen: Callable[[], "Shards"]

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, (), {name: getattr(self, name) for name in _FACTS}

    def read(self, number: int) -> Example:
        """Read one pair, in one request unless captions and image lie far apart; see `Dataset.read`."""
        piece, index, row = self._locate(number)
        first, last = index.image_span(row)
        start, end, is_json = index.caption_span(row)
        low, high = min(first, start), max(last, end)
        if high - low <= last - first + end - start + _MAX_GAP_BYTES:
            data = self._files.read(piece, low, high)
            image, text = data[first - low : last - low], data[start - low : end - low]
        else:
            image, text = self._files.read(piece, first, last), self._files.read(piece, start, end)
        key = index.key(row)
        return Example(key, image, read_captions(text, key, is_json=is_json))

    def key(self, number: int) -> str:
        """Return the key of a pair, which stands in the index."""
        _, index, row = self._locate(number)
        return index.key(row)

    def captions(self, number: int) -> tuple[str, ...]:
        """Read the captions of a pair; see `Dataset.captions`."""
        text, key, is_json = self._text(number)
        return read_captions(text, key, is_json=is_json)

    def metadata(self, number: int) -> dict[str, Any]:
        """Read the JSON that the captions of a pair stand in, empty if they stand in a text; errors as of `read`."""
        text, key, is_json = self._text(number)
        return read_metadata(text, key) if is_json else {}

    def _text(self, number: int) -> tuple[bytes, str, bool]:
        piece, index, row = self._locate(number)
        start, end, is_json = index.caption_span(row)
        return self._files.read(piece, start, end), index.key(row), is_json


class ShardDataset(Shards):
    """The pairs of indexed shards as one sequence; nothing is held in memory per pair, and the index is mapped.

    Args:
        shards: in order.
        index_files: local files whose indexes are those of the shards, in order.
        cache_dir: local folder for what is fetched.
        cache_bytes: how much of it may be there at a time.
        name: as the user typed it.
        split: of the data.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        index_files: Sequence[str],
        *,
        cache_dir: str,
        cache_bytes: int,
        name: str = "",
        split: str = "",
    ) -> None:
        super().__init__(shards, ShardFiles(cache_dir, cache_bytes=cache_bytes))
        options: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": cache_bytes, "name": name, "split": split}
        self._reopen = functools.partial(ShardDataset, shards, index_files, **options)
        self.name, self.split = name, split
        self._indexes = [index for path in index_files for index in read_indexes(path, check=False)]
        self.skipped = Skips()
        for index in self._indexes:
            self.skipped.add_all(index.skipped)
        self._firsts = [0, *accumulate(len(index) for index in self._indexes)]
        self.block_firsts: NDArray[np.int64] = self._cut()
        self.num_blocks = len(self.block_firsts) - 1
        self._piece_of = functools.lru_cache(_MAX_PIECES)(self._find_piece)

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

    def _locate(self, number: int) -> tuple[Piece, ShardIndex, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._firsts, number) - 1
        piece = self._piece_of(bisect_right(self.block_firsts, number) - 1)
        return piece, self._indexes[shard], number - self._firsts[shard]

    def _find_piece(self, block: int) -> Piece:
        first, end = self.block_firsts[block : block + 2].tolist()
        shard = bisect_right(self._firsts, first) - 1
        begin = self._firsts[shard]
        return Piece(self._shards[shard], *self._indexes[shard].span(first - begin, end - 1 - begin))

    def count(self, block: int) -> int:
        """See `BlockDataset.count`."""
        return int(self.block_firsts[block + 1] - self.block_firsts[block])

    def fetch(self, block: int) -> None:
        """Bring a block near, in one request, so that `read` need not wait.

        A remote block goes to the cache of the machine, which all processes share; where that has no room for it,
        its samples are fetched one by one when they are read. A local one goes to the page cache.

        Args:
            block: position in `block_firsts`.

        Raises:
            DataError: the store did not give it; the cause is `UNREAD`.
        """
        piece = self._piece_of(block)
        if piece.num_bytes <= _MAX_BLOCK_FACTOR * BLOCK_BYTES:  # else something large lies between the samples
            self._files.fetch(piece)

    def release(self, block: int) -> None:
        """Say that a block will not be needed soon: it is the first to go where the cache is full."""
        self._files.release(self._piece_of(block))
