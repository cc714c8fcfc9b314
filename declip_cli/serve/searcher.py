"""What the search page asks for: hits for the words of an address, and images made small."""

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from declip_cli.data.decode import decode_image
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.collection import Collection, Term
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.gallery import THUMBNAIL_SIDE_PX
from declip_cli.evaluate.search import Query, describe_hit, describe_query, encode_query
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.pages.frame import shrink
from declip_cli.serve.together import Together

MAX_HITS = 2000
"""In one answer."""
_MAX_OFFSET = 100_000
_MAX_TERMS = 16
_MAX_CHARS = 2000
"""Of one text; models read a few hundred at most."""
_NUM_TEXTS = 1024
"""Texts whose features are remembered, so that scrolling encodes nothing."""
_NUM_THUMBNAILS = 2048
"""Remembered: about 40 MB."""
_VIEW_SIDE_PX = 1600
"""Longer side of an image that is opened."""
_MAX_FOLDERS = 500
"""Suggested by the page."""


class RequestError(Exception):
    """A request cannot be answered; the text says why, for the person at the browser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One search."""

    texts: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    like: int | None = None
    """An image of the collection."""
    image: bytes = b""
    """An encoded image; empty if there is none."""
    within: str = ""
    """As of `Collection.find`."""
    min_score: float = -1.0
    k: int = 10
    offset: int = 0
    """Hits to skip."""

    @classmethod
    def parse(cls, words: Mapping[str, Sequence[str]], image: bytes = b"") -> Self:
        """Read the words of an address: `text`, `minus`, `like`, `within`, `min`, `k`, `offset`.

        Raises:
            RequestError: one of them is unknown or out of range, or nothing is looked for.
        """
        if unknown := words.keys() - {"text", "minus", "like", "within", "min", "k", "offset"}:
            raise RequestError(f"unknown: {min(unknown)} (known: text, minus, like, within, min, k, offset)")
        texts, minus = (tuple(text.strip() for text in words.get(name, ())) for name in ("text", "minus"))
        request = cls(
            texts=tuple(filter(None, texts)),
            minus=tuple(filter(None, minus)),
            like=_index(words, "like", None, 2**31),
            image=image,
            within=words.get("within", ("",))[-1].strip(),
            min_score=_score(words.get("min", ("-1",))[-1]),
            k=_index(words, "k", 10, MAX_HITS) or 1,
            offset=_index(words, "offset", 0, _MAX_OFFSET) or 0,
        )
        if not (request.texts or request.image or request.like is not None):
            raise RequestError("nothing to look for: give text=, like= or an image")
        if len(texts) + len(minus) > _MAX_TERMS or any(len(t) > _MAX_CHARS for t in (*texts, *minus, request.within)):
            raise RequestError(f"at most {_MAX_TERMS} texts of {_MAX_CHARS} characters")
        return request


def _index(words: Mapping[str, Sequence[str]], name: str, default: int | None, largest: int) -> int | None:
    if name not in words:
        return default
    text = words[name][-1]
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= largest):
        raise RequestError(f"{name} is a whole number from 0 to {largest} (got {text[:40]!r})")
    return int(text)


def _score(text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not -1 <= score <= 1:
        raise RequestError(f"min is a score from -1 to 1 (got {text[:40]!r})")
    return score


class Searcher:
    """Answers searches over a collection, from several threads.

    Args:
        model: encodes what is looked for.
        collection: encoded by the same model.
        options: as in `encode_query`.
        quick: let a large collection have an index for speed; see `Collection.use_quick_index`.
    """

    def __init__(
        self, model: PretrainedModel, collection: Collection, options: FeatureOptions, *, quick: bool = False
    ) -> None:
        if quick:
            collection.use_quick_index(options.log)
        self._model, self._collection, self._options = model, collection, options
        # One search uses all cores; those that wait for their turn are answered together.
        self._turn = threading.Lock()
        # A new filter reads all paths, once, whoever asks for it.
        self._asking = threading.Lock()
        self._text_term = lru_cache(_NUM_TEXTS)(Together(self._encode_texts, self._turn))
        self._answer = Together(collection.answer, self._turn)
        self.thumbnail = lru_cache(_NUM_THUMBNAILS)(self._thumbnail)

    def info(self) -> dict[str, Any]:
        """Describe the collection: `collection`, `model`, `index`, `num_indexed`, `folders`."""
        found = self._collection
        paths = (found.path(index) for index in range(len(found)))
        folders = sorted({path.rpartition("/")[0] for path in paths} - {""})
        about = {"collection": found.name, "model": self._model.name, "index": found.index, "num_indexed": len(found)}
        return about | {"folders": folders[:_MAX_FOLDERS]}

    def search(self, request: Request) -> dict[str, Any]:
        """Search.

        Returns:
            `query`, `hits` (`id`, `rank`, `score`, `path`, perhaps `caption`), `num_indexed`, `num_within`, `seconds`.

        Raises:
            RequestError: the image cannot be read, or there is none of this number or path.
        """
        started, found = time.perf_counter(), self._collection
        wanted = [self.known(request.like)] if request.like is not None else []
        words = [f"images like {found.path(index)}" for index in wanted] + ["an image"] * bool(request.image)
        last = request.offset + request.k
        try:
            terms = [found.like(index) for index in wanted] + self._image_terms(request.image)
            terms += [self._text_term(text) for text in request.texts]
            terms += [replace(self._text_term(text), sign=-1) for text in request.minus]
            with self._asking:
                question = found.ask(terms, last, within=request.within)
            indices, scores = self._answer(question)
        except EvaluateError as error:
            raise RequestError(error.message) from error
        ranked = list(enumerate(zip(indices, scores, strict=True), start=1))[request.offset :]
        hits = [
            {"id": index, **describe_hit(found, rank, index, score).to_json()}
            for rank, (index, score) in ranked
            if score >= request.min_score
        ]
        return {
            "query": describe_query([*words, *request.texts], request.minus),
            "hits": hits,
            "num_indexed": len(found),
            "num_within": found.num_within(request.within),
            "seconds": time.perf_counter() - started,
        }

    def known(self, index: int) -> int:
        """Return the number of an image of the collection; RequestError if there is none of it."""
        if not 0 <= index < len(self._collection):
            raise RequestError(f"there is no image {index}")
        return index

    def view(self, index: int) -> bytes:
        """Return an image as a JPEG of at most 1,600 px; errors as in `thumbnail`."""
        return self._shrunk(index, _VIEW_SIDE_PX)

    def _thumbnail(self, index: int) -> bytes:
        """Return a small JPEG of an image; RequestError if there is none, or it cannot be read."""
        return self._shrunk(index, THUMBNAIL_SIDE_PX)

    def _shrunk(self, index: int, side_px: int) -> bytes:
        try:
            return shrink(self._collection.read(self.known(index)), side_px)
        except (DataError, OSError) as error:
            raise RequestError("the image cannot be read") from error

    def _encode_texts(self, texts: Sequence[str]) -> list[Term]:
        return encode_query(self._model, Query(texts=tuple(texts)), options=self._options)

    def _image_terms(self, image: bytes) -> list[Term]:
        if not image:
            return []
        try:
            decode_image(image)
        except DataError as error:
            raise RequestError(error.message) from error
        with tempfile.NamedTemporaryFile(prefix="declip-query-") as file:
            file.write(image)
            file.flush()
            with self._turn:
                return encode_query(self._model, Query(image=Path(file.name)), options=self._options)
