"""The store of features: which image has which content, and which content has which row of vectors.

`images.sqlite` holds both tables; the rows lie one after the other in `vectors.f32`, which is only appended to. A row
counts once the database says so, so that an interruption leaves nothing wrong behind; its number never changes.
"""

import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.dataset import Skips
from declip_cli.errors import EvaluateError

Vectors: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]
T = TypeVar("T")

DATABASE = "images.sqlite"
VECTORS = "vectors.f32"
_WAIT_S = 60.0
"""How long another process that writes to the same store is waited for."""
_UNUSABLE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
_UNUSABLE |= {sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (digest BLOB PRIMARY KEY, number INTEGER UNIQUE, cause TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    key BLOB PRIMARY KEY, stamp TEXT NOT NULL, digest BLOB NOT NULL, caption BLOB NOT NULL
) WITHOUT ROWID;
CREATE TEMP TABLE asked (number INTEGER PRIMARY KEY, key BLOB NOT NULL, stamp TEXT NOT NULL, caption BLOB NOT NULL);
CREATE INDEX asked_keys ON asked (key);
"""


class StoreError(EvaluateError):
    """A store cannot be used: it is damaged (and may be rebuilt), or its folder cannot be read or written."""

    def __init__(self, message: str, *, remedy: str, is_damaged: bool) -> None:
        super().__init__(message, remedy=remedy)
        self.is_damaged = is_damaged


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of one image."""

    index: int
    digest: bytes
    """Of its content; empty if it could not be read, which may pass."""
    vector: Vectors | None = None
    """(D,); None where the content is known, or is no image."""
    cause: str = ""
    """Why there is no vector."""


class VectorStore:
    """An open store; use it with `with`.

    Args:
        folder: made if it does not exist.
        model: fingerprint of the model, and of all else that decides the vectors.
        model_name: for messages.

    Raises:
        EvaluateError: the store was made by another model, is damaged or cannot be opened.
    """

    def __init__(self, folder: Path, *, model: str, model_name: str) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        with self._border():
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                folder / DATABASE, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")  # others may be at it
                with self._writing():
                    self._begin(model, model_name)
            except BaseException:
                self._database.close()
                raise

    def _begin(self, model: str, model_name: str) -> None:
        facts = self.facts()
        if facts.get("model", model) != model:
            raise EvaluateError(
                f"the index {self.folder} was made with the model {facts['model_name']}, not {model_name}, or by "
                "another version of declip",
                remedy=f"name another --index-dir, or delete {self.folder}",
            )
        self.set(model=model, model_name=facts.get("model_name", model_name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def facts(self) -> dict[str, str]:
        """Return what is remembered by name, as of one moment; `num_rows` is the number of vectors."""
        query = "SELECT name, value FROM facts UNION ALL SELECT 'num_rows', COALESCE(MAX(number) + 1, 0) FROM contents"
        with self._border():
            return {str(name): str(value) for name, value in self._database.execute(query)}

    def set(self, **facts: str | int) -> None:
        """Remember words by name."""
        with self._border():
            rows = [(name, str(value)) for name, value in facts.items()]
            self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def ask(self, images: Iterable[tuple[int, str, str, str]]) -> list[tuple[int, int, str, bool]]:
        """Say which images are wanted, and which of them are in the store.

        Args:
            images: number, key, stamp (empty if unknown), caption.

        Returns:
            Number, row (-1 if none), why it has none, and whether the stamp is the same, of those that are there.
        """
        rows = ((index, _bytes(key), stamp, _bytes(caption)) for index, key, stamp, caption in images)
        query = (
            "SELECT a.number, COALESCE(c.number, -1), c.cause, a.stamp = i.stamp AND a.stamp != ''"
            " FROM asked a JOIN images i USING (key) JOIN contents c USING (digest)"
        )
        with self._border():
            self._database.execute("DELETE FROM asked")
            self._database.executemany("INSERT INTO asked VALUES (?, ?, ?, ?)", rows)
            return [(index, row, cause, bool(same)) for index, row, cause, same in self._database.execute(query)]

    def find(self, digests: Sequence[bytes]) -> list[tuple[int, str] | None]:
        """Return the row of each content, -1 if none, and why it has none; None where it is unknown; for any thread."""
        query = "SELECT COALESCE(number, -1), cause FROM contents WHERE digest = ?"
        with self._border(), self._lock:
            return [self._database.execute(query, (digest,)).fetchone() for digest in digests]

    def add(self, encoded: Sequence[Encoded]) -> int:
        """Add contents, all or nothing, and which of the images that were asked for have them.

        Args:
            encoded: numbers as in `ask`; those without a digest are not remembered.

        Returns:
            How many contents are new.
        """
        known = [one for one in encoded if one.digest]
        with self._border(), self._writing():
            there = self.find([one.digest for one in known])
            new = {
                one.digest: one
                for one, found in zip(known, there, strict=True)
                if found is None and (one.vector is not None or one.cause)
            }
            vectors = [one.vector for one in new.values() if one.vector is not None]
            indices = iter(self._append(np.stack(vectors)) if vectors else ())
            rows = [(d, next(indices) if one.vector is not None else None, one.cause) for d, one in new.items()]
            self._database.executemany("INSERT INTO contents VALUES (?, ?, ?)", rows)
            query = "INSERT OR REPLACE INTO images SELECT key, stamp, ?, caption FROM asked WHERE number = ?"
            self._database.executemany(query, [(one.digest, one.index) for one in known])
        return len(new)

    def _append(self, vectors: Vectors) -> range:
        """Write rows behind those that count, and return their numbers."""
        facts, path = self.facts(), self.folder / VECTORS
        first = int(facts["num_rows"])
        if not first:
            path.unlink(missing_ok=True)  # others may still look into what lies there
        with path.open("ab") as file:
            file.truncate(first * vectors.shape[1] * 4)
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).data)
            file.flush()
            os.fsync(file.fileno())
        crc = _crc(vectors, int(facts.get("crc", 0)) if first else 0)
        self.set(dim=vectors.shape[1], crc=crc, stamp=_stamp(path))
        return range(first, first + len(vectors))

    def vectors(self) -> Vectors:
        """Map all rows, (V, D); valid for as long as it is held."""
        facts, path = self.facts(), self.folder / VECTORS
        with self._border():
            shape = int(facts["num_rows"]), int(facts.get("dim", 0))
        if not shape[0]:
            return np.empty(shape, dtype=np.float32)
        try:
            found: Vectors = np.memmap(path, dtype=np.float32, mode="r", shape=shape)
            # Other sizes and times are those of a copy, a broken-off write or a change.
            if _stamp(path) != facts.get("stamp") and str(_crc(found)) != facts.get("crc"):
                raise ValueError("not what was written")
        except (OSError, ValueError) as error:
            raise self._damaged(f"{VECTORS} is missing, too short or not what was written") from error
        return found

    def listed(self) -> list[tuple[str, str, int]]:
        """Return key, caption and row of every image that has one, by key."""
        query = "SELECT key, caption, number FROM images JOIN contents USING (digest) WHERE number IS NOT NULL"
        with self._border():
            found = self._database.execute(f"{query} ORDER BY key")
            return [(_text(key), _text(caption), row) for key, caption, row in found]

    def skipped(self) -> Skips:
        """Return the images that have no vector."""
        query = "SELECT cause, COUNT(*), MIN(key) FROM images JOIN contents USING (digest) WHERE number IS NULL"
        with self._border():
            found = self._database.execute(f"{query} GROUP BY cause")
            return Skips({cause: (count, _text(key)) for cause, count, key in found})

    def keep_asked(self) -> int:
        """Forget all images but those that were asked for, take over captions, and return how many were forgotten.

        The contents stay known, so that an image that comes back is not encoded again.
        """
        with self._border(), self._writing():
            query = "DELETE FROM images WHERE key NOT IN (SELECT key FROM asked)"
            num_gone = self._database.execute(query).rowcount
            query = "UPDATE images SET caption = asked.caption FROM asked"
            self._database.execute(f"{query} WHERE asked.key = images.key AND asked.caption != images.caption")
        return num_gone

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:  # a look-up of another thread would hold the lock for reading that other processes wait for
            self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")  # waits for those who read
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    @contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            if isinstance(error, OSError) or (code is not None and code & 0xFF in _UNUSABLE):
                raise StoreError(
                    f"cannot use the index {self.folder}: {error}",
                    remedy="wait until no other declip writes to it, or name another folder with --index-dir",
                    is_damaged=False,
                ) from error
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> StoreError:
        remedy = f"name its images again with --index-dir {self.folder}: it is then rebuilt"
        return StoreError(f"the index {self.folder} is damaged: {why}", remedy=remedy, is_damaged=True)


def _bytes(text: str) -> bytes:
    """File names and captions may hold what is no text."""
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def _crc(vectors: Vectors, crc: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(vectors, dtype=np.float32).data, crc)


def is_store(folder: Path) -> bool:
    """Return whether a folder holds a store."""
    return (folder / DATABASE).is_file()


def use_store(
    folder: Path, model: str, model_name: str, work: Callable[[VectorStore], T], log: Callable[[str], None]
) -> T:
    """Do some work with a store; one that turns out to be damaged is rebuilt, and the work is repeated.

    Args:
        folder: as in `VectorStore`, as `model` and `model_name` are.
        model: its fingerprint.
        model_name: for messages.
        work: what is done.
        log: receives a note on a damaged store.

    Raises:
        StoreError: the store cannot be used.
    """
    try:
        with VectorStore(folder, model=model, model_name=model_name) as store:
            return work(store)
    except StoreError as error:
        if not error.is_damaged:
            raise
        log(f"{error.message}; it is rebuilt")
    for pattern in (f"{DATABASE}*", "vectors*.f32", "index-*.faiss"):
        for path in folder.glob(pattern):  # processes that still use it go on with what they have open
            path.unlink(missing_ok=True)
    with VectorStore(folder, model=model, model_name=model_name) as store:
        return work(store)
