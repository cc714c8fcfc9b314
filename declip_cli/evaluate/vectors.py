"""The store of features: which image has which content, and which content has which row of vectors.

`images.sqlite` holds both tables; the rows lie one after the other in `vectors-*.f32`, which is only appended to. A
row counts once the database says so, so that an interruption leaves nothing wrong behind.
"""

import itertools
import os
import secrets
import sqlite3
import threading
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
_WAIT_S = 60.0
"""How long another process that writes to the same store is waited for."""
_MAX_DEAD = 0.2
"""Above this share of rows that belong to no image, the vectors are written anew without them."""
_UNUSABLE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
_UNUSABLE |= {sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (digest BLOB PRIMARY KEY, number INTEGER UNIQUE, cause TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    key BLOB PRIMARY KEY, stamp TEXT NOT NULL, digest BLOB NOT NULL, caption BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_digest ON images (digest);
CREATE TEMP TABLE asked (number INTEGER PRIMARY KEY, key BLOB NOT NULL, stamp TEXT NOT NULL, caption BLOB NOT NULL);
CREATE INDEX asked_keys ON asked (key);
"""
_UNUSED = "number IS NOT NULL AND NOT EXISTS (SELECT 1 FROM images WHERE images.digest = contents.digest)"


class StoreError(EvaluateError):
    """A store cannot be used: it is damaged (and may be made anew), or its folder cannot be read or written."""

    def __init__(self, message: str, *, remedy: str, is_damaged: bool) -> None:
        super().__init__(message, remedy=remedy)
        self.is_damaged = is_damaged


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one image."""

    number: int
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
                    self._check_model(model, model_name)
            except BaseException:
                self._database.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def fact(self, name: str) -> str:
        """Return a remembered word; empty if there is none."""
        with self._border(), self._lock:
            row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set(self, **facts: str | int) -> None:
        """Remember words by name."""
        with self._border():
            rows = [(name, str(value)) for name, value in facts.items()]
            self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def ask(self, images: Iterable[tuple[int, str, str, str]]) -> None:
        """Say which images are wanted: number, key, stamp (empty if unknown), caption."""
        with self._border():
            self._database.execute("DELETE FROM asked")
        rows = ((number, _bytes(key), stamp, _bytes(caption)) for number, key, stamp, caption in images)
        while block := list(itertools.islice(rows, 4096)):
            with self._border(), self._writing("BEGIN"):
                self._database.executemany("INSERT INTO asked VALUES (?, ?, ?, ?)", block)

    def answers(self) -> list[tuple[int, int, str]]:
        """Return number, row (-1 if none) and why it has none, of the wanted images that are as they were."""
        query = (
            "SELECT a.number, COALESCE(c.number, -1), c.cause FROM asked a JOIN images i USING (key)"
            " JOIN contents c USING (digest) WHERE a.stamp = i.stamp AND a.stamp != ''"
        )
        with self._border():
            return list(self._database.execute(query))

    def num_known(self) -> int:
        """Count the wanted images that are in the store, perhaps with another content."""
        with self._border():
            return int(self._database.execute("SELECT COUNT(*) FROM asked JOIN images USING (key)").fetchone()[0])

    def find(self, digests: Sequence[bytes]) -> list[tuple[int, str]]:
        """Return the row of each content, -1 where there is none, and why it has none, where that is known."""
        query = "SELECT COALESCE(number, -1), cause FROM contents WHERE digest = ?"
        with self._border(), self._lock:
            return [self._database.execute(query, (digest,)).fetchone() or (-1, "") for digest in digests]

    def has(self, digest: bytes) -> bool:
        """Say whether a content is known, as an image or as none; for any thread."""
        with self._border(), self._lock:
            query = "SELECT 1 FROM contents WHERE digest = ?"
            return self._database.execute(query, (digest,)).fetchone() is not None

    def add(self, encoded: Sequence[Encoded], *, are_images: bool = True) -> int:
        """Add contents, all or nothing, and which of the images that were asked for have them.

        Args:
            encoded: their numbers are those of `ask`; those without a digest are not remembered.
            are_images: else only the contents are remembered.

        Returns:
            How many contents are new.
        """
        known = [one for one in encoded if one.digest]
        with self._border(), self._writing():
            new = {
                one.digest: one for one in known if (one.vector is not None or one.cause) and not self.has(one.digest)
            }
            vectors = [one.vector for one in new.values() if one.vector is not None]
            first = self._append(np.stack(vectors)) if vectors else 0
            numbers = iter(range(first, first + len(vectors)))
            rows = [(d, next(numbers) if one.vector is not None else None, one.cause) for d, one in new.items()]
            self._database.executemany("INSERT INTO contents VALUES (?, ?, ?)", rows)
            if are_images:
                query = "INSERT OR REPLACE INTO images SELECT key, stamp, ?, caption FROM asked WHERE number = ?"
                self._database.executemany(query, [(one.digest, one.number) for one in known])
        return len(new)

    def vectors(self) -> Vectors:
        """Map all rows, (V, D); valid for as long as it is held."""
        with self._border():
            num, dim = self._num_rows(), int(self.fact("dim") or 0)
        if not num:
            return np.empty((0, dim), dtype=np.float32)
        path = self.folder / self.fact("vectors_file")
        try:
            return np.memmap(path, dtype=np.float32, mode="r", shape=(num, dim))
        except (OSError, ValueError) as error:
            raise self._damaged(f"{path.name} is missing or too short") from error

    def listed(self) -> list[tuple[str, str, int]]:
        """Return key, caption and row of every image that has one, by key."""
        with self._border():
            query = "SELECT key, caption, number FROM images JOIN contents USING (digest) WHERE number IS NOT NULL"
            found = self._database.execute(query + " ORDER BY key")
            return [(_text(key), _text(caption), row) for key, caption, row in found]

    def snapshot(self) -> tuple[list[tuple[str, str, int]], Vectors]:
        """Return `listed` and `vectors` as of one moment, whatever other processes write."""
        with self._border(), self._writing("BEGIN"):
            return self.listed(), self.vectors()

    def skipped(self) -> Skips:
        """Return the images that have no vector."""
        query = "SELECT cause, COUNT(*), MIN(key) FROM images JOIN contents USING (digest) WHERE number IS NULL"
        with self._border():
            found = self._database.execute(query + " GROUP BY cause")
            return Skips({cause: (count, _text(key)) for cause, count, key in found})

    def keep_asked(self) -> int:
        """Forget all images but those that were asked for, take over captions, and return how many were forgotten."""
        obsolete: list[str] = []
        with self._border(), self._writing():
            query = "DELETE FROM images WHERE key NOT IN (SELECT key FROM asked)"
            num_gone = self._database.execute(query).rowcount
            query = "UPDATE images SET caption = asked.caption FROM asked"
            self._database.execute(query + " WHERE asked.key = images.key AND asked.caption != images.caption")
            dead = [row[0] for row in self._database.execute(f"SELECT number FROM contents WHERE {_UNUSED}")]
            if len(dead) > _MAX_DEAD * self._num_rows():
                obsolete = [name for name in (self.fact("vectors_file"), self.fact("index_file")) if name]
                self._compact(np.setdiff1d(np.arange(self._num_rows()), dead))
        for name in obsolete:
            with suppress(OSError):
                (self.folder / name).unlink()
        return num_gone

    def _compact(self, keep: Rows) -> None:
        vectors = self.vectors()  # (V, D)
        self._database.execute(f"DELETE FROM contents WHERE {_UNUSED}")
        moves = [(-1 - new, int(row)) for new, row in enumerate(keep)]
        self._database.executemany("UPDATE contents SET number = ? WHERE number = ?", moves)
        self._database.execute("UPDATE contents SET number = -1 - number WHERE number < 0")
        self.set(vectors_file="", index_file="")
        for first in range(0, len(keep), 65536):
            self._append(vectors[keep[first : first + 65536]], first=first)

    def _append(self, vectors: Vectors, *, first: int | None = None) -> int:
        """Write rows behind those that count, and return the number of the first."""
        first = self._num_rows() if first is None else first
        name = self.fact("vectors_file") or f"vectors-{secrets.token_hex(6)}.f32"
        with (self.folder / name).open("ab") as file:
            file.truncate(first * vectors.shape[1] * 4)
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.set(vectors_file=name, dim=vectors.shape[1])
        return first

    def _num_rows(self) -> int:
        with self._border():
            return int(self._database.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM contents").fetchone()[0])

    def _check_model(self, model: str, model_name: str) -> None:
        if self.fact("model") not in ("", model):
            raise EvaluateError(
                f"the index {self.folder} was made with the model {self.fact('model_name')}, not {model_name}, or by "
                "another version of declip",
                remedy=f"name another --index-dir, or delete {self.folder}",
            )
        self.set(model=model, model_name=self.fact("model_name") or model_name)

    @contextmanager
    def _writing(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        with self._lock:  # a look-up of another thread would hold the lock for reading that other processes wait for
            self._database.execute(begin)
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
        remedy = f"name its images again with --index-dir {self.folder}: it is then made anew"
        return StoreError(f"the index {self.folder} is damaged: {why}", remedy=remedy, is_damaged=True)


def _bytes(text: str) -> bytes:
    """File names and captions may hold what is no text."""
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def is_store(folder: Path) -> bool:
    """Say whether a folder holds a store."""
    return (folder / DATABASE).is_file()


def remove_store(folder: Path) -> None:
    """Delete the files of a store; processes that still use it go on with what they have open."""
    for pattern in (f"{DATABASE}-*", DATABASE, "vectors-*.f32", "index-*.faiss"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def use_store(
    folder: Path, model: str, model_name: str, work: Callable[[VectorStore], T], say: Callable[[str], None]
) -> T:
    """Do some work with a store; one that turns out to be damaged is made anew.

    Args:
        folder: of the store; made if it does not exist.
        model: as of `VectorStore`.
        model_name: as of `VectorStore`.
        work: begun a second time if the store is damaged.
        say: told of a damaged store.

    Returns:
        What the work returns.

    Raises:
        StoreError: the store cannot be used.
    """
    try:
        with VectorStore(folder, model=model, model_name=model_name) as store:
            return work(store)
    except StoreError as error:
        if not error.is_damaged:
            raise
        say(f"{error.message}; it is made anew")
    remove_store(folder)
    with VectorStore(folder, model=model, model_name=model_name) as store:
        return work(store)
