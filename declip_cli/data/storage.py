"""Files by name, on the local disk or behind any URL that fsspec understands; network errors are retried."""

import errno
import functools
import glob
import io
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from declip_cli.data.dataset import UNREAD
from declip_cli.errors import DataError
from declip_cli.files import write_bytes

T = TypeVar("T")
DISK_FULL = "disk full"
"""Cause of errors for want of space."""
PART_BYTES = 8 << 20
"""How much of a remote file is asked for at once where it is read from front to back."""
_WAITS_S = (0.1, 0.4, 1.6, 6.4)
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, DataError)
_PASSING = (408, 425, 429)
"""What a web server answers where a request may succeed later, besides its own faults."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    """Distinguish URLs such as `s3://bucket/list.csv` from local paths."""
    return "://" in path


def attempt(path: str, work: Callable[[], T]) -> T:
    """Do something with a file of a disk or a store, five times if need be, with growing pauses of random length.

    Raises:
        FileNotFoundError: there is no such file; so at once.
        DataError: it failed every time; the cause is `UNREAD`.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return work()
        except _FINAL:
            raise
        except Exception as error:
            if wait_s is None:
                reason = str(error) or type(error).__name__
                remedy = "check the disk or the network, then run the same command again"
                raise DataError(f"cannot read {path}: {reason}", remedy=remedy, cause=UNREAD) from error
            time.sleep(wait_s * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


@functools.lru_cache(maxsize=4096)
def _store(url: str) -> tuple[Any, str]:
    """Open the fsspec file system behind a URL, and name the path there."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"cannot open {url}: {error}", remedy="pip install s3fs, gcsfs or what it names") from error
    except ValueError as error:
        raise DataError(f"cannot open {url}: {error}", remedy="check the URL") from error
    return system, path


def _ask(url: str, method: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401  (as fsspec)
    system, path = _store(url)

    def work() -> Any:  # noqa: ANN401
        try:
            return getattr(system, method)(path, *args, **options)
        except FileNotFoundError as error:
            status = getattr(error.__cause__, "status", 0)
            is_final = 400 <= status < 500 and status not in _PASSING
            if error.__cause__ is None or is_final or not url.startswith("http"):
                raise
            raise error.__cause__ from None  # fsspec takes any fault of a web server for a file that is not there

    return attempt(url, work)


class _RemoteFile(io.RawIOBase):
    """A remote file read in ranges, each of which is asked for again where it fails or comes in half."""

    def __init__(self, url: str) -> None:
        self._url, self._size, self._at = url, facts(url).num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (any writable buffer)
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = read_range(self._url, self._at, self._at + count) if count else b""
        self._at += count
        return count


def open_binary(path: str) -> BinaryIO:
    """Open a local or remote file for reading bytes, here and there; the caller closes it.

    Raises:
        OSError: there is none, or none that may be read.
        DataError: the store cannot be reached, or the package for it is missing.
    """
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(path), PART_BYTES)) if is_remote(path) else open(path, "rb")


def read_bytes(path: str) -> bytes:
    """Read a whole file; errors as in `open_binary`."""
    return bytes(_ask(path, "cat_file")) if is_remote(path) else Path(path).read_bytes()


def read_range(url: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end - 1` of a remote file in one request; fewer than those are a fault like any other."""
    system, path = _store(url)

    def read() -> bytes:
        data: bytes = system.cat_file(path, start=start, end=end)
        data = data[start:end] if len(data) > end - start else data  # from a server that knows no ranges
        if len(data) != end - start:
            raise EOFError(f"{len(data):,} bytes came instead of {end - start:,}")
        return data

    return attempt(url, read)


def is_file(path: str) -> bool:
    """Return whether there is a file of this name."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        return bool(_ask(path, "info")["type"] == "file")  # `isfile` of fsspec says no where a store fails
    except OSError:
        return False


def is_folder(path: str) -> bool:
    """Return whether there is a folder of this name."""
    return bool(_ask(path, "isdir")) if is_remote(path) else os.path.isdir(path)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known about a file without reading it."""

    num_bytes: int
    stamp: str
    """Changes when the content does, as far as the disk or the store says."""
    changed: float = 0.0
    """When, in seconds since 1970, if a store says so."""


def _facts(info: dict[str, Any], path: str) -> FileFacts:
    size = info["size"] if info.get("size") is not None else len(read_bytes(path))  # as of some servers
    marks = (info.get(name) for name in ("ETag", "etag", "generation", "mtime", "LastModified", "created"))
    changed = info.get("LastModified") or info.get("mtime") or info.get("created")
    stamp = f"{size} {next((mark for mark in marks if mark), '')}"
    return FileFacts(int(size), stamp, changed.timestamp() if isinstance(changed, datetime) else 0.0)


def facts(path: str) -> FileFacts:
    """Ask for the size and the age of a file; errors as in `open_binary`."""
    if is_remote(path):
        return _facts(_ask(path, "info"), path)
    stat = os.stat(path)
    return FileFacts(stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")


def join(folder: str, name: str) -> str:
    """Join a folder and a relative name, local or remote."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """Return the folder a file lies in, `.` for a bare name."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def walk(folder: str) -> Iterator[str]:
    """List the files below a folder, each folder's together, hidden ones omitted, as names relative to the folder."""
    if not is_remote(folder):
        yield from _walk_local(folder, "", ())
        return
    root = _store(folder)[1].rstrip("/") + "/"
    names = (str(found).removeprefix(root) for found in _ask(folder, "find"))
    shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    yield from sorted(shown, key=lambda name: name.rpartition("/")[::2])


def _walk_local(root: str, below: str, above: tuple[str, ...]) -> Iterator[str]:
    """Follow links to folders, but not around in circles."""
    real = os.path.realpath(os.path.join(root, below))
    if real in above:
        return
    found = _entries(os.path.join(root, below))
    yield from (below + name for name, entry in found if entry["type"] != "directory")
    for name, entry in found:
        if entry["type"] == "directory":
            yield from _walk_local(root, f"{below}{name}/", (*above, real))


def list_files(folder: str, endings: tuple[str, ...]) -> dict[str, FileFacts]:
    """List the files directly in a folder, sorted, hidden ones omitted, in one request; none if there is no folder."""
    files = {name: entry for name, entry in _entries(folder) if entry["type"] == "file" and name.endswith(endings)}
    if is_remote(folder):
        return {name: _facts(entry, join(folder, name)) for name, entry in files.items()}
    return {name: facts(join(folder, name)) for name in files}


def names_in(folder: str) -> list[str]:
    """List the names of the files directly in a folder, as `list_files`."""
    return [name for name, entry in _entries(folder) if entry["type"] == "file"]


def folders_in(folder: str) -> list[str]:
    """List the names of the folders directly in a folder, as `list_files`."""
    return [name for name, entry in _entries(folder) if entry["type"] == "directory"]


def _entries(folder: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        if is_remote(folder):
            found = [(entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in _ask(folder, "ls", detail=True)]
        else:
            with os.scandir(folder) as entries:  # which follows links, as fsspec does not
                kinds = ("other", "file", "directory")
                found = [(entry.name, {"type": kinds[entry.is_file() + 2 * entry.is_dir()]}) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}", remedy="check its permissions") from error
    return sorted(((name, entry) for name, entry in found if not name.startswith(".")), key=lambda pair: pair[0])


def expand(pattern: str) -> list[str]:
    """Spell out `{000..127}`, `{train,val}`, `*` and `?` in a local path or a URL, in the order of the pattern.

    Braces are spelled out whether the files exist or not, so that a missing one is noticed; what stars find is sorted.
    """
    choices = [[piece] for piece in _BRACES.split(pattern)]  # text, inside of braces, text, …
    for inside in choices[1::2]:
        found = _RANGE.fullmatch(inside[0])
        if found:
            first, last = found.groups()
            inside[:] = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            inside[:] = inside[0].split(",")
    return [path for words in itertools.product(*choices) for path in _expand_stars("".join(words))]


def _expand_stars(pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*?[") or (not is_remote(pattern) and os.path.exists(pattern)):
        return [pattern]
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{found.removeprefix(scheme + '://').lstrip('/')}" for found in sorted(_ask(pattern, "glob"))]


def write_whole(path: str, data: bytes) -> None:
    """Write a file so that it appears whole or not at all.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    with disk_errors(path):
        _ask(path, "pipe_file", data) if is_remote(path) else write_bytes(Path(path), data)


def move_into_place(temporary: str, path: str) -> None:
    """Turn a finished local temporary file into its final file, local or remote; errors as in `write_whole`."""
    with disk_errors(path):
        if not is_remote(path):
            os.replace(temporary, path)
            return
        system, inner = _store(path)
        attempt(path, lambda: system.put_file(temporary, inner))
        os.remove(temporary)


def make_folder(path: str) -> None:
    """Make a folder and those above it, where missing; errors as in `write_whole`."""
    with disk_errors(path):
        _ask(path, "makedirs", exist_ok=True) if is_remote(path) else os.makedirs(path, exist_ok=True)


def remove_file(path: str) -> None:
    """Delete a file if it is there; errors as in `write_whole`."""
    with disk_errors(path), suppress(FileNotFoundError):
        _ask(path, "rm_file") if is_remote(path) else os.remove(path)


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn failures to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space or choose another --out, then run the same command again to continue"
            raise DataError(f"the disk is full: cannot write {path}", remedy=remedy, cause=DISK_FULL) from error
        reason = error.strerror or error
        raise DataError(f"cannot write {path}: {reason}", remedy="check the folder and its permissions") from error
