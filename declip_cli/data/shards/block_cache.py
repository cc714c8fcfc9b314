"""Pieces of remote shards on the local disk, shared by all processes of a machine and bounded.

The caches of fsspec are neither: they delete by age alone and let every process fetch what it misses.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

_ROOM_AFTER_EVICTION = 0.05
_STALE_S = 3600.0
_SCANS = 3
_LEDGER = "bytes.lock"


@contextmanager
def locked(path: str) -> Iterator[bool]:
    """Hold a lock among all threads and processes of the machine.

    Args:
        path: local path of a file for it; its folder is made.

    Yields:
        False where that is not possible.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        with suppress(OSError):  # a disk that knows no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(file)


@contextmanager
def _removed(path: str) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            os.remove(path)


class BlockCache:
    """Files by name; what has been released goes first, then what was fetched longest ago.

    A cache that cannot be written, for want of space or of rights, keeps nothing and harms nothing.

    Args:
        folder: local path, made when first needed.
        bound_bytes: how much all files in it may take.
    """

    def __init__(self, folder: str, *, bound_bytes: int) -> None:
        self._folder, self._bound_bytes = folder, bound_bytes

    def path(self, name: str) -> str:
        """Name the file that a piece is in, if it is there."""
        return os.path.join(self._folder, name)

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Read from a piece; empty if it is not there."""
        try:
            file = os.open(self.path(name), os.O_RDONLY)
        except OSError:
            return b""
        try:
            return os.pread(file, num_bytes, offset)
        except OSError:
            return b""
        finally:
            os.close(file)

    def fetch(self, name: str, num_bytes: int, download: Iterable[bytes]) -> None:
        """Have a piece in the cache; one process downloads, others that want the same one wait for it.

        Args:
            name: says what the piece holds, and changes when that does.
            num_bytes: its size.
            download: yields it, part by part, when it is asked to.

        Raises:
            DataError: as `download` raises.
        """
        lock = self.path(f"{name}.lock")
        if self._touch(name):
            return
        with locked(lock) as is_locked, _removed(lock):
            temporary = self._reserve(name, num_bytes) if is_locked and not self._touch(name) else ""
            if temporary:
                with _removed(temporary), suppress(OSError):  # of a full disk
                    self._fill(temporary, download)
                    os.replace(temporary, self.path(name))

    def release(self, name: str) -> None:
        """Let a piece be the first to go."""
        with suppress(OSError):
            os.utime(self.path(name), (0, 0))

    def _touch(self, name: str) -> bool:
        try:
            os.utime(self.path(name))
        except OSError:
            return False
        return True

    @staticmethod
    def _fill(path: str, download: Iterable[bytes]) -> None:
        with open(path, "r+b", buffering=0) as file:
            for part in download:
                while part:
                    part = part[file.write(part) :]

    def _reserve(self, name: str, num_bytes: int) -> str:
        """Make room, and a file of zeros of that size, so that others count it; empty if there is no room."""
        with locked(self.path(_LEDGER)) as is_locked:
            if not is_locked or num_bytes > self._bound_bytes:
                return ""
            try:
                used = self._count(0) + num_bytes
                if used > self._bound_bytes:
                    used = self._evict(int(self._bound_bytes * (1 - _ROOM_AFTER_EVICTION)) - num_bytes) + num_bytes
                if used > self._bound_bytes:
                    return ""
                self._count(used)
                temporary = self.path(f"{name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
                with open(temporary, "xb") as file:
                    file.truncate(num_bytes)
            except OSError:
                return ""
            return temporary

    def _count(self, used: int) -> int:
        """Write down how many bytes are in use, or, given 0, say how many were: perhaps too many, never too few."""
        path = self.path("bytes")
        if used:
            with open(path, "w") as file:
                file.write(str(used))
            return used
        try:
            with open(path) as file:
                return int(file.read())
        except (OSError, ValueError):
            return self._bound_bytes + 1  # nobody knows: count again

    def _evict(self, target_bytes: int) -> int:
        """Delete until at most so many bytes are left; return how many are."""
        for turn in range(_SCANS):
            try:
                files = self._files()
                break
            except FileNotFoundError:  # another process has just put one into place, or given it up
                if turn == _SCANS - 1:
                    raise
        left = sum(size for _, size, _ in files)
        for changed, size, path in files:
            is_in_the_making = path.endswith(".tmp") and time.time() - changed < _STALE_S
            if left > target_bytes and not is_in_the_making:
                with suppress(OSError):
                    os.remove(path)
                    left -= size
        return left

    def _files(self) -> list[tuple[float, int, str]]:
        """List when each was fetched, how large it is and where, in that order."""
        with os.scandir(self._folder) as entries:
            named = [entry for entry in entries if not entry.name.startswith("bytes") and entry.name[-5:] != ".lock"]
            stats = [(entry.stat(), entry.path) for entry in named]
        return sorted((stat.st_mtime, stat.st_size, path) for stat, path in stats)
