"""Files by name, on the local disk or behind any URL that fsspec understands."""

import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from declip_cli.errors import DataError
from declip_cli.files import write_bytes

DISK_FULL = "disk full"
"""Cause of errors for want of space."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    """Tell URLs such as `s3://bucket/list.csv` from local paths."""
    return "://" in path


def remote_system(url: str) -> tuple[Any, str]:
    """Open the file system behind a URL.

    Args:
        url: any URL that fsspec understands.

    Returns:
        The fsspec file system, and the path within it.

    Raises:
        DataError: fsspec, or the package for this kind of URL, is not installed.
    """
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(
            f"cannot open {url}: {error}", remedy="pip install 'declip[remote]', and s3fs or gcsfs as needed"
        ) from error
    except ValueError as error:
        raise DataError(f"cannot open {url}: {error}", remedy="check the URL") from error
    return system, path


def failures_of(path: str) -> type[Exception]:
    """Name what reading a file may raise: OSError, or behind a URL anything, as the packages for stores do."""
    return Exception if is_remote(path) else OSError


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading bytes.

    Args:
        path: local path or URL.

    Returns:
        The open file; the caller closes it.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_remote(path):
        return open(path, "rb")
    system, inner = remote_system(path)
    return cast(BinaryIO, system.open(inner, "rb"))


def read_bytes(path: str) -> bytes:
    """Read a whole file; arguments and errors as of `open_binary`."""
    with open_binary(path) as file:
        return file.read()


def is_file(path: str) -> bool:
    """Say whether there is a file of this name."""
    if not is_remote(path):
        return os.path.isfile(path)
    system, inner = remote_system(path)
    return bool(system.isfile(inner))


def is_folder(path: str) -> bool:
    """Say whether there is a folder of this name."""
    if not is_remote(path):
        return os.path.isdir(path)
    system, inner = remote_system(path)
    return bool(system.isdir(inner))


def num_bytes(path: str) -> int:
    """Return the size of a file in bytes."""
    if not is_remote(path):
        return os.path.getsize(path)
    system, inner = remote_system(path)
    return int(system.size(inner))


def join(folder: str, name: str) -> str:
    """Put a relative name behind a folder, local or remote."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """Return the folder a file lies in, `.` for a bare name."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def walk(folder: str) -> Iterator[str]:
    """List the files below a folder in a fixed order, each folder's files together, hidden ones left out.

    Args:
        folder: local path or URL.

    Yields:
        Names relative to the folder, with `/` between folders.
    """
    if is_remote(folder):
        system, inner = remote_system(folder)
        root = inner.rstrip("/") + "/"
        names = sorted((str(found).removeprefix(root) for found in system.find(inner)), key=_folder_and_name)
        yield from (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    else:
        yield from _walk_local(folder, "")


def _walk_local(root: str, below: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Follow links to folders, but not around in circles."""
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}", remedy="check its permissions") from error
    yield from (below + name for name, is_folder in found if not is_folder)
    for name, is_folder in found:
        if is_folder:
            yield from _walk_local(root, f"{below}{name}/", (*above, real))


def _folder_and_name(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def names_in(folder: str) -> list[str]:
    """List the names of the files directly in a folder, sorted, hidden ones left out."""
    if is_remote(folder):
        system, inner = remote_system(folder)
        found = [entry["name"].rsplit("/", 1)[-1] for entry in system.ls(inner) if entry["type"] == "file"]
    else:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.is_file()]
    return sorted(name for name in found if not name.startswith("."))


def folders_in(folder: str) -> list[str]:
    """List the names of the folders directly in a folder, sorted, hidden ones left out."""
    if is_remote(folder):
        system, inner = remote_system(folder)
        entries = system.ls(inner) if system.isdir(inner) else []
        found = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] != "file"]
    else:
        with os.scandir(folder) as local:
            found = [entry.name for entry in local if entry.is_dir()]
    return sorted(name for name in found if not name.startswith("."))


def expand(pattern: str) -> list[str]:
    """Spell out `{000..127}`, `{train,val}`, `*` and `?` in a path.

    Args:
        pattern: local path or URL.

    Returns:
        Paths in the order of the pattern; those from `*` and `?` sorted. Braces are spelled out whether the
        files exist or not, so that a missing one is noticed.
    """
    return [path for spelled in _expand_braces(pattern) for path in _expand_stars(spelled)]


def _expand_braces(pattern: str) -> list[str]:
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, …
    choices = [[piece] if number % 2 == 0 else _alternatives(piece) for number, piece in enumerate(pieces)]
    return ["".join(words) for words in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if not found:
        return inside.split(",")
    first, last = found.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _expand_stars(pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*?[") or (not is_remote(pattern) and os.path.exists(pattern)):
        return [pattern]
    if not is_remote(pattern):
        root = Path(pattern).anchor
        relative = pattern[len(root) :]
        return sorted(str(path) for path in Path(root or ".").glob(relative))
    system, inner = remote_system(pattern)
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{found.lstrip('/')}" for found in sorted(system.glob(inner))]


def write_whole(path: str, data: bytes) -> None:
    """Write a file so that it appears whole or not at all.

    Args:
        path: local path or URL; its folder exists.
        data: the content.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    with disk_errors(path):
        if is_remote(path):
            system, inner = remote_system(path)
            system.pipe_file(inner, data)
        else:
            write_bytes(Path(path), data)


def move_into_place(temporary: str, path: str) -> None:
    """Turn a finished local temporary file into its final file, uploading it where that is remote.

    Args:
        temporary: local path; gone afterwards.
        path: local path or URL.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    with disk_errors(path):
        if is_remote(path):
            system, inner = remote_system(path)
            system.put_file(temporary, inner)
            os.remove(temporary)
        else:
            os.replace(temporary, path)


def make_folder(path: str) -> None:
    """Make a folder and those above it, where missing; errors as of `write_whole`."""
    with disk_errors(path):
        if is_remote(path):
            system, inner = remote_system(path)
            system.makedirs(inner, exist_ok=True)
        else:
            os.makedirs(path, exist_ok=True)


def remove_file(path: str) -> None:
    """Delete a file if it is there; errors as of `write_whole`."""
    with disk_errors(path):
        if is_remote(path):
            system, inner = remote_system(path)
            if system.exists(inner):
                system.rm_file(inner)
        elif os.path.lexists(path):
            os.remove(path)


class disk_errors:  # noqa: N801  (used as a function: `with disk_errors(path):`)
    """Turn failures to write into errors that say what to do."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise DataError where an OSError came up."""
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full: cannot write {self._path}",
                remedy="free some space or choose another --out, then run the same command again to go on",
                cause=DISK_FULL,
            ) from error
        raise DataError(
            f"cannot write {self._path}: {error.strerror or error}",
            remedy="check the folder and its permissions",
        ) from error
