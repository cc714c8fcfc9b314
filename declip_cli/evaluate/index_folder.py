"""A saved index of pictures: grows by what is new or changed, survives interruptions, is searched from disk.

`pictures.sqlite` says which picture has which content and which content has which row; `vectors-*.f32` holds the
rows, one after the other, and is only appended to; `index-*.faiss` is derived from them. A row counts once the
database says so, so that a broken-off write leaves nothing wrong behind.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import decode_image
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.features import ImageFeatures, ImageInput
from declip_cli.evaluate.index_database import DATABASE, IndexDatabase
from declip_cli.evaluate.listed import ListedPicture
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, Vectors, search_exact

_BLOCK = 512
"""Pictures that are read, encoded and saved together; an interruption loses at most these."""
_MAX_DEAD = 0.2
"""Above this share of rows without a picture all is written anew without them."""
_GROWTH = 2
"""A trained index is trained again when there are so many times more vectors than it was trained on."""

Encode: TypeAlias = Callable[[Sequence[ImageInput]], ImageFeatures]
"""Pictures → unit length features, (N, D)."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update did."""

    num_added: int = 0
    num_changed: int = 0
    num_removed: int = 0
    num_encoded: int = 0
    """New contents: pictures that were renamed or copied are not encoded again."""

    def to_json(self) -> dict[str, int]:
        """Return the four counts by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Match:
    """One picture found."""

    path: str
    caption: str
    score: float


def is_index_folder(path: Path) -> bool:
    """Say whether a folder holds a saved index."""
    return (path / DATABASE).is_file()


class IndexFolder:
    """An open index folder; use it with `with`.

    Args:
        folder: made if it does not exist.
        fingerprint: of the model; one folder holds the vectors of one model.
        model_name: for messages.

    Raises:
        EvaluateError: the index was made by another model, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, fingerprint: str, model_name: str) -> None:
        self._folder = folder
        self._database = IndexDatabase(folder, fingerprint=fingerprint, model_name=model_name)

    def __enter__(self) -> "IndexFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()

    def __len__(self) -> int:
        """Return the number of pictures that can be found."""
        return self._database.num_found

    def skipped(self) -> dict[str, dict[str, int | str]]:
        """Return the pictures that cannot be read, by cause."""
        return self._database.skipped()

    @property
    def spec(self) -> str:
        """How the index is built; `Flat` is exact."""
        return self._database.fact("spec") or EXACT

    def update(
        self,
        pictures: Sequence[ListedPicture],
        encode: Encode,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Changes:
        """Make the index hold exactly these pictures.

        Args:
            pictures: all that shall be found; those with the stamp they had are not read again, and a content that
                is there already is not encoded again.
            encode: what makes the vectors.
            progress: told how many of the new and changed pictures are done.

        Returns:
            What was done.
        """
        known = self._database.entries()
        todo = [p for p in pictures if not p.stamp or p.path not in known or known[p.path][0] != p.stamp]
        num_encoded = 0
        for first in range(0, len(todo), _BLOCK):
            num_encoded += self._add(todo[first : first + _BLOCK], encode)
            if progress is not None:
                progress(min(first + _BLOCK, len(todo)), len(todo))
        gone = known.keys() - {picture.path for picture in pictures}
        captions = [(p.path, p.caption) for p in pictures if p.path in known and known[p.path][1] != p.caption]
        if todo or gone or captions:
            with self._database.writing():
                self._database.remove_pictures(gone)
                self._database.set_captions(captions)
                self._database.count()
        num_changed = sum(picture.path in known for picture in todo)
        return Changes(len(todo) - num_changed, num_changed, len(gone), num_encoded)

    def rebuild(self, spec: str) -> None:
        """Bring what is derived up to date: drop rows without pictures, build or extend the faiss index.

        Args:
            spec: `Flat`, or a description for `faiss.index_factory`; empty keeps what there is.

        Raises:
            EvaluateError: there is no picture, or the index cannot be made.
        """
        if not len(self):
            raise EvaluateError(
                f"the index {self._folder} holds no picture that can be read",
                remedy="check that the files are pictures",
            )
        spec = spec or self.spec
        with self._database.writing():
            if len(self._database.dead_rows()) > _MAX_DEAD * self._database.num_rows:
                self._compact()
            if spec == EXACT:
                self._database.replace_file("index_file", "")
            else:
                self._build(spec)
            self._database.set(spec=spec)

    def search(self, query: Vectors, k: int) -> list[Match]:
        """Find the pictures nearest to a vector.

        Args:
            query: unit length, (D,).
            k: how many are wanted.

        Returns:
            The best first; pictures with the same content follow each other by path.
        """
        vectors, dead = self._vectors(), self._database.dead_rows()
        name = self._database.fact("index_file")
        if name:
            index = ApproximateIndex.read(self._folder / name, self.spec, is_mapped=True)
            scores, rows = index.search(vectors, query, k, dead=dead)
        else:
            scores, rows = search_exact(vectors, query, k, dead=dead)
        found = [
            Match(path, caption, score)
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
            for path, caption in self._database.pictures_of(row)
        ]
        return found[:k]

    def _add(self, block: Sequence[ListedPicture], encode: Encode) -> int:
        contents = [c if isinstance(c := _read(picture), bytes | str) else c.tobytes() for picture in block]
        digests = [hashlib.sha256(c).digest() if isinstance(c, bytes) else None for c in contents]
        new = {
            digest: (picture.path, content)
            for picture, content, digest in zip(block, contents, digests, strict=True)
            if isinstance(content, bytes) and digest is not None and not self._database.is_known(digest)
        }
        vectors, causes = _encode(new, encode)
        entries = [
            (picture.path, picture.stamp, digest, content if isinstance(content, str) else "", picture.caption)
            for picture, content, digest in zip(block, contents, digests, strict=True)
        ]
        with self._database.writing():
            self._append({digest: vector for digest, vector in vectors.items() if not self._database.is_known(digest)})
            self._database.add_unreadable(causes.items())
            self._database.add_pictures(entries)
        return len(new)

    def _append(self, vectors: dict[bytes, Vectors]) -> None:
        if not vectors:
            return
        features = np.stack(list(vectors.values())).astype(np.float32, copy=False)  # (n, D)
        first = self._database.num_rows
        if not self._database.fact("dim"):
            self._database.set(dim=str(features.shape[1]), vectors_file=self._database.fresh_file("vectors", "f32"))
        with (self._folder / self._database.fact("vectors_file")).open("ab") as file:
            file.truncate(first * features.shape[1] * 4)
            file.write(features.tobytes())
        self._database.add_contents(vectors, first)

    def _build(self, spec: str) -> None:
        vectors, name = self._vectors(), self._database.fact("index_file")
        index = None
        if name and self.spec == spec and (self._folder / name).is_file():
            index = ApproximateIndex.read(self._folder / name, spec, is_mapped=False)
            if index.needs_training and len(vectors) > _GROWTH * int(self._database.fact("trained_rows")):
                index = None
        if index is None:
            index = ApproximateIndex.build(spec, vectors)
            self._database.set(trained_rows=str(len(vectors)))
        elif len(index) < len(vectors):
            index.add(vectors[len(index) :])
        else:
            return
        fresh = self._database.fresh_file("index", "faiss")
        index.write(self._folder / fresh)
        self._database.replace_file("index_file", fresh)

    def _compact(self) -> None:
        keep = np.setdiff1d(np.arange(self._database.num_rows), self._database.dead_rows())  # (N,)
        vectors = self._vectors()
        fresh = self._database.fresh_file("vectors", "f32")
        with (self._folder / fresh).open("wb") as file:
            for part in np.array_split(keep, max(1, len(keep) // 65536)):
                file.write(vectors[part].tobytes())
        self._database.renumber(keep)
        self._database.replace_file("vectors_file", fresh)
        self._database.replace_file("index_file", "")

    def _vectors(self) -> Vectors:
        num, dim = self._database.num_rows, int(self._database.fact("dim") or 0)
        if not num:
            return np.empty((0, dim), dtype=np.float32)
        path = self._folder / self._database.fact("vectors_file")
        if not path.is_file() or path.stat().st_size < num * dim * 4:
            raise EvaluateError(
                f"the index is damaged: {path} is missing or too short", remedy=f"delete {self._folder}"
            )
        return np.memmap(path, dtype=np.float32, mode="r", shape=(num, dim))


def _encode(new: dict[bytes, tuple[str, bytes]], encode: Encode) -> tuple[dict[bytes, Vectors], dict[bytes, str]]:
    """Return the vectors of new contents by digest, and why others have none."""
    if not new:
        return {}, {}
    digests = list(new)
    try:
        found = encode([(path, partial(bytes, content)) for path, content in new.values()])
    except EvaluateError:  # none of the pictures can be read
        causes = {digest: _cause(content) for digest, (_, content) in new.items()}
        if not all(causes.values()):
            raise
        return {}, causes
    vectors = {digests[number]: row for number, row in zip(found.kept, found.features.numpy(), strict=True)}
    return vectors, {digest: _cause(new[digest][1]) or "not a picture" for digest in digests if digest not in vectors}


def _cause(content: bytes) -> str:
    """Say why a picture cannot be decoded; empty if it can."""
    try:
        decode_image(content)
    except DataError as error:
        return error.cause
    return ""


def _read(picture: ListedPicture) -> bytes | Pixels | str:
    """Return a picture's bytes, or why there are none."""
    try:
        return picture.read()
    except DataError as error:
        return error.cause
    except FileNotFoundError:
        return "missing file"
    except OSError as error:
        return f"unreadable file: {error.strerror}"
