"""Files that appear whole or not at all, and folders whose bytes are vouched for by a list of digests."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUMS_FILE = "SHA256SUMS"
"""Digests of a folder's files, as `sha256sum --check` reads them."""
MAX_JSON_BYTES = 2**24
"""Of a configuration or a header; a longer one is damaged. A byte of it can take 24 of memory."""


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401  (JSON is anything)
    """Parse JSON that may be damaged or hostile; bytes are UTF-8, a byte order mark is left out.

    Raises:
        ValueError: it is not JSON, or it is nested a thousand lists deep, as only an attack is.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def read_json(path: Path) -> Any:  # noqa: ANN401  (JSON is anything)
    """Read a JSON file that may be damaged or hostile.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or longer than `MAX_JSON_BYTES`.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES:,} bytes")
    return parse_json(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (JSON is anything)
    """Write JSON for people and programs to read, whole, as `write_bytes` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: under another name first, flushed to the disk, then renamed.

    It is safe with several writers, of which the last wins.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")  # process numbers repeat on other machines
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears whole, with the digests of its files, in place of the one before.

    Between the two renames at the end there is a moment in which only `existing_folder` finds the one before.

    Yields:
        Where to write the files.

    Raises:
        OSError: it cannot be written; the folder before is untouched and nothing half remains.
    """
    temporary, previous = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in paths:
            path.chmod(0o666 & ~mask)  # safetensors makes files for the owner alone; a model is to be shared
            _flush(path)
        sums = "".join(f"{digest_of(path)}  {path.relative_to(temporary).as_posix()}\n" for path in paths)
        write_text(temporary / SUMS_FILE, sums)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def existing_folder(folder: Path) -> Path:
    """Find a folder made by `new_folder`, also in the moment in which it is replaced or after a kill in it."""
    previous = folder.with_name(folder.name + ".old")
    return previous if previous.is_dir() and not folder.is_dir() else folder


def check_folder(folder: Path) -> None:
    """Compare the files of a folder made by `new_folder` with the digests written with them.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is not what was written, or the list of digests is damaged.
    """
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {line.partition("  ")[2] for line in lines}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS_FILE}
    for line in lines:
        digest, gap, name = line.partition("  ")
        if len(digest) != 64 or not gap or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{SUMS_FILE} is damaged")
        if digest_of(folder / name) != digest:
            raise ValueError(f"{name} is not what was written: its sha256 differs from {SUMS_FILE}")
    if more := sorted(there - listed):
        raise ValueError(f"{more[0]} is not listed in {SUMS_FILE}")
    if not lines:
        raise ValueError(f"{SUMS_FILE} is empty")


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
