"""Bytes of shards, for several threads: from local files kept open, from the cache, or from the store itself."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from declip_cli.data import storage
from declip_cli.data.dataset import UNREAD
from declip_cli.data.shards.block_cache import BlockCache
from declip_cli.errors import DataError

_MAX_OPEN = 256
_PART_BYTES = 2 * storage.PART_BYTES


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar archive, found but not opened."""

    path: str
    """Local path or URL."""
    num_bytes: int
    stamp: str
    """Changes when its content does, as far as the store or the manifest says."""
    sha256: str = ""
    """By the manifest, if there is one."""
    has_index: bool = False
    """An index that is not older stands beside it in the store; on a disk that is looked up when it is needed."""

    @property
    def is_remote(self) -> bool:
        """Say whether it has to be fetched."""
        return storage.is_remote(self.path)


class Piece:
    """Consecutive bytes of a shard that are fetched together.

    Args:
        shard: which.
        start: first byte.
        end: behind the last.
    """

    def __init__(self, shard: Shard, start: int, end: int) -> None:
        self.shard, self.start, self.num_bytes = shard, start, end - start
        digest = hashlib.sha256(f"{shard.path} {shard.stamp}".encode("utf-8", "surrogateescape")).hexdigest()
        self.name = f"{digest[:24]}-{start:x}-{end:x}"
        """Of its file in the cache."""


@contextmanager
def _shard_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # it is gone; all else has been tried several times and is a DataError by now
        remedy = "check the path and the disk"
        raise DataError(f"cannot read the shard {path}: {error}", remedy=remedy, cause=UNREAD) from error


class _Handle:
    """A file descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """Hand out bytes of shards; thread-safe; keeps at most 256 files open.

    Args:
        cache_dir: local folder for what is fetched.
        cache_bytes: how much of it may be there at a time.
    """

    def __init__(self, cache_dir: str, *, cache_bytes: int) -> None:
        self._cache = BlockCache(os.path.join(cache_dir, "blocks"), bound_bytes=cache_bytes)
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, piece: Piece, start: int, end: int) -> bytes:
        """Read bytes `start` to `end - 1` of a shard; from a piece that was fetched without asking the store.

        Args:
            piece: what they are in.
            start: first byte.
            end: behind the last.

        Returns:
            The bytes.

        Raises:
            DataError: the shard cannot be read, with the cause `UNREAD`, or is shorter.
        """
        path = piece.shard.path
        with _shard_errors(path):
            if piece.shard.is_remote:
                data = self._cache.read(piece.name, start - piece.start, end - start)
                return data if len(data) == end - start else storage.read_range(path, start, end)
            data = storage.attempt(path, lambda: self._read_local(path, start, end))
        if len(data) < end - start:
            raise DataError(
                f"the shard {path} ends before byte {end:,}, up to which a sample goes",
                remedy="copy it again, or prepare the data again",
                cause="truncated tar",
            )
        return data

    def fetch(self, piece: Piece) -> None:
        """Bring a piece into the cache of this machine, or a local one into the page cache; errors as of `read`."""
        path, start, end = piece.shard.path, piece.start, piece.start + piece.num_bytes
        parts = ((at, min(end, at + _PART_BYTES)) for at in range(start, end, _PART_BYTES))
        with _shard_errors(path):
            if piece.shard.is_remote:
                download = (storage.read_range(path, *part) for part in parts)
                self._cache.fetch(piece.name, piece.num_bytes, download)
            elif hasattr(os, "posix_fadvise"):  # not on macOS
                handle = storage.attempt(path, lambda: self._handle(path))
                os.posix_fadvise(handle.number, start, piece.num_bytes, os.POSIX_FADV_WILLNEED)

    def release(self, piece: Piece) -> None:
        """Say that a piece is not needed soon."""
        if piece.shard.is_remote:
            self._cache.release(piece.name)

    def open(self, shard: Shard) -> BinaryIO:
        """Open a whole shard, from the cache if it has been fetched as one piece; errors as of `read`."""
        cached = self._cache.path(Piece(shard, 0, shard.num_bytes).name)
        is_cached = shard.is_remote and os.path.exists(cached)
        with _shard_errors(shard.path):
            return storage.attempt(shard.path, lambda: storage.open_binary(cached if is_cached else shard.path))

    def _read_local(self, path: str, start: int, end: int) -> bytes:
        handle = self._handle(path)  # held while reading: another thread may push it out of the list
        try:
            return os.pread(handle.number, end - start, start)
        except OSError:
            with self._lock:
                self._open.pop(path, None)  # a server of files that comes back knows the old handle no more
            raise

    def _handle(self, path: str) -> _Handle:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Handle(path)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return handle
