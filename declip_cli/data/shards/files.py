"""Reading pieces of shards from several threads: local files kept open, remote ones cached piece by piece."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from declip_cli.data.samples import UNREAD
from declip_cli.data.shards import storage
from declip_cli.errors import DataError

_MAX_OPEN = 256
_RETRY_AFTER_S = (0.1, 0.5, 2.0)


class _Handle:
    """A file descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """Hand out bytes of many shards; thread-safe; keeps at most 256 files open.

    A remote shard is never fetched whole: each piece is asked for once and kept in a sparse local file, so an
    exact shuffle over all shards can start at once and later epochs read from the local disk.
    """

    def __init__(self, shards: list[str], *, cache_dir: str) -> None:
        self._shards = shards
        self._cache_dir = os.path.join(cache_dir, "shards")
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._remote: dict[int, _CachedShard] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, *, offset: int, num_bytes: int, sample: int) -> bytes:
        """Read one piece.

        Args:
            shard: position in the list of shards.
            offset: in bytes.
            num_bytes: how many.
            sample: number of the sample within its shard; marks the piece in the cache.

        Returns:
            The bytes, fewer only if the shard ends early.

        Raises:
            DataError: the shard cannot be read, in four attempts over 2.6 seconds.
        """
        path = self._shards[shard]
        for wait_s in (*_RETRY_AFTER_S, None):
            try:
                return self._read_once(shard, offset, num_bytes, sample)
            except DataError:  # a package is missing
                raise
            except storage.failures_of(path) as error:
                if wait_s is None or isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"cannot read the shard {path}: {error}", remedy="check the disk or the network", cause=UNREAD
                    ) from error
                with self._lock:
                    self._open.pop(path, None)  # a server of files that comes back knows the old handle no more
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _read_once(self, shard: int, offset: int, num_bytes: int, sample: int) -> bytes:
        path = self._shards[shard]
        if storage.is_remote(path):
            return self._cached(shard).read(offset, num_bytes, sample)
        handle = self._handle(path)  # held while reading: another thread may push it out of the list
        return os.pread(handle.number, num_bytes, offset)

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

    def _cached(self, shard: int) -> "_CachedShard":
        with self._lock:
            if shard not in self._remote:
                self._remote[shard] = _CachedShard(self._shards[shard], self._cache_dir)
            return self._remote[shard]


class _CachedShard:
    """A sparse local copy of a remote shard, with a byte per sample that says whether it is there.

    Where the disk has no room for it, pieces are fetched every time.
    """

    def __init__(self, url: str, cache_dir: str) -> None:
        self._system, self._path = storage.remote_system(url)
        stamp = f"{url}\0{self._stamp()}"
        name = hashlib.sha256(stamp.encode()).hexdigest()[:24]
        with suppress(DataError):
            storage.make_folder(cache_dir)
        self._data = os.path.join(cache_dir, f"{name}.tar")
        self._marks_path = os.path.join(cache_dir, f"{name}.marks")
        self._handle: _Handle | None = None
        self._marks = bytearray()
        if os.path.exists(self._data) and os.path.exists(self._marks_path):
            with open(self._marks_path, "rb") as file:
                self._marks = bytearray(file.read())

    def _stamp(self) -> str:
        facts: dict[str, Any] = self._system.info(self._path)
        return "\0".join(str(facts.get(name)) for name in ("size", "ETag", "etag", "mtime", "created"))

    def read(self, offset: int, num_bytes: int, sample: int) -> bytes:
        if sample < len(self._marks) and self._marks[sample]:
            if self._handle is None:
                self._handle = _Handle(self._data)
            return os.pread(self._handle.number, num_bytes, offset)
        data: bytes = self._system.cat_file(self._path, start=offset, end=offset + num_bytes)
        if len(data) < num_bytes:
            raise OSError(f"{len(data):,} bytes came instead of {num_bytes:,}")
        with suppress(OSError):
            self._keep(data, offset, sample)
        return data

    def _keep(self, data: bytes, offset: int, sample: int) -> None:
        for path, piece, position in ((self._data, data, offset), (self._marks_path, b"\1", sample)):
            number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                if os.pwrite(number, piece, position) < len(piece):
                    return  # the disk is full
            finally:
                os.close(number)
        self._marks.extend(bytes(max(0, sample + 1 - len(self._marks))))
        self._marks[sample] = 1
