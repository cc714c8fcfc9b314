"""Bytes of shards, for several threads: from local files kept open, from the cache, or from the store itself."""

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from declip_cli.data import storage
from declip_cli.data.dataset import UNREAD
from declip_cli.errors import DataError

_MAX_OPEN = 256
_PART_BYTES = 2 * storage.PART_BYTES
_ROOM_AFTER_EVICTION = 0.05
_STALE_S = 3600.0
_LEDGER = "bytes"
"""File with the number of bytes in a cache: perhaps too many, never too few."""


@contextmanager
def locked(path: str) -> Iterator[bool]:
    """Hold a lock among all threads and processes of the machine.

    Args:
        path: local path of a file for it, which is there no longer than the lock; its folder is made.

    Yields:
        False where that is not possible.
    """
    try:
        file = lock_file(path)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            os.remove(path)
        os.close(file)


def lock_file(path: str, *, wait: bool = True) -> int:
    """Open and lock a file, which is to be deleted before it is closed; it and its folder are made.

    Raises:
        BlockingIOError: another process has locked it, and `wait` is false.
    """
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:  # a disk that knows no locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # of one who has just let go of it


class BlockCache:
    """Files by name, shared by all processes of a machine and bounded; the caches of fsspec are neither.

    What has been released goes first, then what was fetched longest ago. A cache that cannot be written, for want of
    space or of rights, keeps nothing and harms nothing.

    Args:
        folder: local path, made when first needed.
        bound_bytes: how much all files in it may take.
    """

    def __init__(self, folder: str, *, bound_bytes: int) -> None:
        self._folder, self._bound_bytes = folder, bound_bytes

    def path(self, name: str) -> str:
        """Name the file that a piece is in, if it is there."""
        return f"{self._folder}/{name}"

    def fetch(self, name: str, num_bytes: int, download: Iterable[bytes]) -> None:
        """Have a piece in the cache; one process downloads, others that want the same one wait for it.

        Args:
            name: says what the piece holds, and changes when that does.
            num_bytes: its size.
            download: yields it, part by part, when it is asked to.

        Raises:
            DataError: as `download` raises.
        """
        if self._touch(name):
            return
        with locked(self.path(f"{name}.lock")) as is_locked:
            if not is_locked or self._touch(name):  # by now another has fetched it
                return
            temporary = self.path(f"{name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
            try:
                with suppress(OSError):  # of a full disk
                    if self._reserve(temporary, num_bytes):
                        self._fill(temporary, download)
                        with locked(self.path(f"{_LEDGER}.lock")):  # who counts finds it under either name
                            os.replace(temporary, self.path(name))
            finally:
                with suppress(OSError):
                    os.remove(temporary)

    def wait(self, name: str) -> bool:
        """Wait while anybody on this machine fetches a piece; return whether anybody did."""
        with suppress(OSError), open(self.path(f"{name}.lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return True
        return False

    def release(self, name: str) -> None:
        """Let a piece be the first to go."""
        self._touch(name, (0, 0))

    def _touch(self, name: str, times: tuple[int, int] | None = None) -> bool:
        with suppress(OSError):
            os.utime(self.path(name), times)
            return True
        return False

    @staticmethod
    def _fill(path: str, download: Iterable[bytes]) -> None:
        with open(path, "r+b", buffering=0) as file:
            for part in download:
                while part:
                    part = part[file.write(part) :]

    def _reserve(self, temporary: str, num_bytes: int) -> bool:
        """Make room, and a file of zeros of that size, so that others count it."""
        with locked(self.path(f"{_LEDGER}.lock")) as is_locked:
            if not is_locked or num_bytes > self._bound_bytes:
                return False
            try:
                with open(self.path(_LEDGER)) as file:
                    used = int(file.read()) + num_bytes
            except (OSError, ValueError):
                used = self._bound_bytes + 1  # nobody knows: count again
            if used > self._bound_bytes:
                used = self._evict(int(self._bound_bytes * (1 - _ROOM_AFTER_EVICTION)) - num_bytes) + num_bytes
            if used > self._bound_bytes:
                return False
            with open(self.path(_LEDGER), "w") as file:
                file.write(str(used))
            with open(temporary, "xb") as file:
                file.truncate(num_bytes)
            return True

    def _evict(self, target_bytes: int) -> int:
        """Delete until at most so many bytes are left; return how many are."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.startswith(_LEDGER) and not entry.name.endswith(".lock"):
                    with suppress(FileNotFoundError):  # another process has just given it up
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        left = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            is_in_the_making = path.endswith(".tmp") and time.time() - changed < _STALE_S
            if left > target_bytes and not is_in_the_making:
                with suppress(OSError):
                    os.remove(path)
                    left -= size
        return left


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
        """Return whether it has to be fetched."""
        return storage.is_remote(self.path)


class Piece:
    """Bytes `start` to `end - 1` of a shard, which are fetched together."""

    def __init__(self, shard: Shard, start: int, end: int) -> None:
        self.shard, self.start, self.end = shard, start, end
        digest = hashlib.sha256(f"{shard.path} {shard.stamp}".encode("utf-8", "surrogateescape")).hexdigest()
        self.name = f"{digest[:24]}-{start:x}-{end:x}"
        """Of its file in the cache."""


class _Handle:
    """A file descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.descriptor)


@contextmanager
def _shard_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # it is gone; all else has been tried several times and is a DataError by now
        remedy = "check the path and the disk"
        raise DataError(f"cannot read the shard {path}: {error}", remedy=remedy, cause=UNREAD) from error


class ShardFiles:
    """Hand out bytes of shards; thread-safe; keeps at most 256 files open.

    Args:
        cache_dir: local folder for indexes and for what is fetched.
        cache_bytes: how much may be fetched at a time.
    """

    def __init__(self, cache_dir: str, cache_bytes: int) -> None:
        self.cache_dir, self._cache_bytes = cache_dir, cache_bytes
        self._cache = BlockCache(os.path.join(cache_dir, "blocks"), bound_bytes=cache_bytes)
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFiles, (self.cache_dir, self._cache_bytes)

    def read(self, piece: Piece, start: int, end: int) -> bytes:
        """Read bytes `start` to `end - 1` of a shard; from a piece that is fetched without asking the store.

        Raises:
            DataError: the shard cannot be read, with the cause `UNREAD`, or is shorter.
        """
        path = piece.shard.path
        if start == end:
            return b""
        if piece.shard.is_remote:
            data = self._read_cached(piece, start, end)
            if not data and self._cache.wait(piece.name):
                data = self._read_cached(piece, start, end)
            with _shard_errors(path):
                return data or storage.read_range(path, start, end)
        with _shard_errors(path):
            data = storage.attempt(path, lambda: self._pread(path, start, end))
        if len(data) < end - start:
            raise DataError(
                f"the shard {path} ends before byte {end:,}, up to which a sample goes",
                remedy="copy it again, or prepare the data again",
                cause="truncated tar",
            )
        return data

    def fetch(self, piece: Piece) -> None:
        """Bring a piece into the cache of this machine, or a local one into the page cache; errors as in `read`."""
        path, start, end = piece.shard.path, piece.start, piece.end
        with _shard_errors(path):
            if piece.shard.is_remote:
                self._close_deleted()
                cuts = range(start, end, _PART_BYTES)
                download = (storage.read_range(path, cut, min(end, cut + _PART_BYTES)) for cut in cuts)
                self._cache.fetch(piece.name, end - start, download)
            elif hasattr(os, "posix_fadvise"):  # not on macOS
                handle = storage.attempt(path, lambda: self._handle(path))
                os.posix_fadvise(handle.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def release(self, piece: Piece) -> None:
        """Mark a piece as not needed soon."""
        if piece.shard.is_remote:
            self._cache.release(piece.name)

    def open(self, shard: Shard) -> BinaryIO:
        """Open a whole shard, from the cache if it has been fetched as one piece; errors as in `read`."""
        cached = self._cache.path(Piece(shard, 0, shard.num_bytes).name)
        path = cached if shard.is_remote and os.path.exists(cached) else shard.path
        with _shard_errors(shard.path):
            return storage.attempt(shard.path, lambda: storage.open_binary(path))

    def _read_cached(self, piece: Piece, start: int, end: int) -> bytes:
        """Read from a piece in the cache; empty if it is not there."""
        with suppress(OSError):
            data = self._pread(self._cache.path(piece.name), start - piece.start, end - piece.start)
            return data if len(data) == end - start else b""
        return b""

    def _pread(self, path: str, start: int, end: int) -> bytes:
        handle = self._handle(path)  # held while reading: another thread may push it out of the list
        try:
            return os.pread(handle.descriptor, end - start, start)
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

    def _close_deleted(self) -> None:
        """Close what the cache has deleted, so that the disk gets its room back."""
        with self._lock:
            for path, handle in list(self._open.items()):
                if not os.fstat(handle.descriptor).st_nlink:
                    del self._open[path]
