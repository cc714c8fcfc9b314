"""The database of a saved index: which picture has which content, and which content has which row."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from declip_cli.errors import EvaluateError

DATABASE = "pictures.sqlite"
_FORMAT = "1"
_WAIT_S = 60.0
"""How long another process that writes to the same folder is waited for."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (
    digest BLOB PRIMARY KEY, number INTEGER UNIQUE, cause TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (
    path TEXT PRIMARY KEY, stamp TEXT NOT NULL, digest BLOB, cause TEXT NOT NULL, caption TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_digest ON pictures (digest);
"""
_UNUSED = "NOT EXISTS (SELECT 1 FROM pictures WHERE pictures.digest = contents.digest)"
_DEAD = f"number IS NOT NULL AND {_UNUSED}"


class IndexDatabase:
    """An open database of an index folder.

    Args:
        folder: made if it does not exist.
        fingerprint: of the model; one folder holds the vectors of one model.
        model_name: for messages.

    Raises:
        EvaluateError: the index was made by another model, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, fingerprint: str, model_name: str) -> None:
        self._folder = folder
        self._obsolete: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / DATABASE, timeout=_WAIT_S, isolation_level=None)
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise EvaluateError(
                f"cannot open the index {folder}: {error}", remedy="name another folder with --index-dir"
            ) from error
        try:
            self._check("format", _FORMAT, "was written by another version of declip")
            self._check("model", fingerprint, f"was made with the model {self.fact('model_name')}, not {model_name}")
        except EvaluateError:
            self.close()
            raise
        self.set(model_name=self.fact("model_name") or model_name)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing, and write all or nothing.

        Raises:
            EvaluateError: another process does not finish.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise EvaluateError(
                f"the index {self._folder} is being written by another declip", remedy="wait until it is done"
            ) from error
        self._obsolete = []
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
        for name in filter(None, self._obsolete):
            (self._folder / name).unlink(missing_ok=True)

    def fact(self, name: str) -> str:
        """Return a remembered word; empty if there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set(self, **facts: str) -> None:
        """Remember words by name."""
        self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def fresh_file(self, kind: str, suffix: str) -> str:
        """Return a file name that was never used, such as index-3.faiss."""
        number = int(self.fact("num_files") or 0)
        self.set(num_files=str(number + 1))
        return f"{kind}-{number}.{suffix}"

    def replace_file(self, fact: str, name: str) -> None:
        """Let a derived file take the place of another, which is deleted once the change is written."""
        self._obsolete.append(self.fact(fact))
        self.set(**{fact: name})

    @property
    def num_rows(self) -> int:
        """Rows of vectors that count."""
        return int(self.fact("num_rows") or 0)

    @property
    def num_found(self) -> int:
        """Pictures that have a vector."""
        return int(self.fact("num_found") or 0)

    def entries(self) -> dict[str, tuple[str, str]]:
        """Return each picture's stamp and caption by path."""
        query = "SELECT path, stamp, caption FROM pictures"
        return {path: (stamp, caption) for path, stamp, caption in self._database.execute(query)}

    def is_known(self, digest: bytes) -> bool:
        """Say whether a content was seen before, readable or not."""
        return self._database.execute("SELECT 1 FROM contents WHERE digest = ?", (digest,)).fetchone() is not None

    def add_contents(self, digests: Iterable[bytes], first: int) -> None:
        """Give contents the rows from `first` on."""
        rows = [(digest, row) for row, digest in enumerate(digests, first)]
        self._database.executemany("INSERT INTO contents VALUES (?, ?, '')", rows)
        self.set(num_rows=str(first + len(rows)))

    def add_unreadable(self, causes: Iterable[tuple[bytes, str]]) -> None:
        """Remember contents that are no pictures, and why."""
        self._database.executemany("INSERT OR IGNORE INTO contents VALUES (?, NULL, ?)", causes)

    def add_pictures(self, entries: Sequence[tuple[str, str, bytes | None, str, str]]) -> None:
        """Add or replace pictures: path, stamp, digest, why it cannot be read, caption."""
        self._database.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)", entries)

    def remove_pictures(self, paths: Iterable[str]) -> None:
        """Forget pictures; their contents stay."""
        self._database.executemany("DELETE FROM pictures WHERE path = ?", ((path,) for path in paths))

    def set_captions(self, captions: Iterable[tuple[str, str]]) -> None:
        """Replace captions, (path, caption)."""
        rows = ((caption, path) for path, caption in captions)
        self._database.executemany("UPDATE pictures SET caption = ? WHERE path = ?", rows)

    def count(self) -> None:
        """Count anew what depends on all pictures; searches then need not."""
        query = "SELECT COUNT(*) FROM pictures JOIN contents USING (digest) WHERE number IS NOT NULL"
        num_found = self._database.execute(query).fetchone()[0]
        num_dead = self._database.execute(f"SELECT COUNT(*) FROM contents WHERE {_DEAD}").fetchone()[0]
        self.set(num_found=str(num_found), num_dead=str(num_dead))

    def dead_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows whose content no picture has any more, sorted, (n,)."""
        if self.fact("num_dead") in ("", "0"):
            return np.empty(0, dtype=np.int64)
        query = f"SELECT number FROM contents WHERE {_DEAD} ORDER BY number"
        return np.array([row[0] for row in self._database.execute(query)], dtype=np.int64)

    def renumber(self, keep: npt.NDArray[np.int64]) -> None:
        """Forget unused contents and number the rows that stay, in their order."""
        self._database.execute(f"DELETE FROM contents WHERE digest IN (SELECT digest FROM contents WHERE {_UNUSED})")
        moves = ((-1 - new, int(row)) for new, row in enumerate(keep))
        self._database.executemany("UPDATE contents SET number = ? WHERE number = ?", moves)
        self._database.execute("UPDATE contents SET number = -1 - number WHERE number < 0")
        self.set(num_rows=str(len(keep)), num_dead="0")

    def pictures_of(self, row: int) -> list[tuple[str, str]]:
        """Return path and caption of the pictures with a row's content, by path."""
        query = "SELECT path, caption FROM pictures JOIN contents USING (digest) WHERE number = ? ORDER BY path"
        return list(self._database.execute(query, (row,)))

    def skipped(self) -> dict[str, dict[str, int | str]]:
        """Return the pictures that cannot be read, by cause."""
        query = """
            SELECT CASE WHEN p.cause != '' THEN p.cause ELSE c.cause END AS why, COUNT(*), MIN(p.path)
            FROM pictures p LEFT JOIN contents c USING (digest)
            WHERE c.number IS NULL GROUP BY why
        """
        rows = self._database.execute(query)
        return {cause: {"count": count, "first": first} for cause, count, first in rows}

    def _check(self, name: str, value: str, complaint: str) -> None:
        found = self.fact(name)
        if found and found != value:
            raise EvaluateError(
                f"the index {self._folder} {complaint}", remedy=f"name another --index-dir, or delete {self._folder}"
            )
        self.set(**{name: value})
