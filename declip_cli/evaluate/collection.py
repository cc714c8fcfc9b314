"""A collection of images held ready for searches: encoded once, ranked for every query."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.dataset import Dataset, Pixels, Skips
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import embedder, image_features, update_store
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, Found, best, quick_spec, saved_index, search_exact
from declip_cli.evaluate.token_wise import encode_image_tokens
from declip_cli.evaluate.vectors import Rows, Vectors, VectorStore, use_store
from declip_cli.model.checkpoint import PretrainedModel

_CHUNK_IMAGES = 1024
"""Images compared with a query token by token at once."""
_NUM_SCOPES = 16
"""Filters by path whose images are remembered."""
_MIN_NORM = 1e-4
"""Of the sum of a query's terms, below which they cancel each other."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a query."""

    sign: int
    """1: what is looked for; -1: what is not."""
    features: Vectors
    """Unit length, (1, D); of a token-wise model one row per token or patch, (L, Q)."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """The images that a search is confined to, ordered by their rows."""

    indices: Rows
    """(N',)."""
    rows: Rows
    """Ascending, (N',); images of the same content share one."""
    distinct: Rows
    """(R,)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A search that is ready to be answered."""

    terms: Sequence[Term]
    features: Vectors | None
    """Their sum, unit length, (D,); None of token-wise models."""
    k: int
    within: str
    scope: _Scope

    @property
    def size(self) -> int:
        """The power of two from `k` on, so that questions for about as many images are answered together."""
        return 1 << (self.k - 1).bit_length()


Answer = tuple[list[int], list[float]]
"""Numbers of images, best first, and their scores."""


class Collection:
    """Images that can be searched, numbered from 0 to N - 1.

    Args:
        dataset: the images and their captions.
        kept: those that could be encoded, by their number in the data set, (N,).
        features: unit vectors, (V, D), or of a token-wise model (V, P, Q); may be memory-mapped.
        rows: the row of each image in `features`, (N,).
        index: over the rows; None compares all of them.
        skipped: images that cannot be searched.
        changes: `num_added`, `num_changed`, `num_removed`, `num_encoded` of a saved index; empty without one.
    """

    def __init__(
        self,
        dataset: Dataset,
        kept: Sequence[int],
        features: NDArray[np.float32],
        rows: Rows,
        *,
        index: ApproximateIndex | None = None,
        skipped: Skips | None = None,
        changes: dict[str, int] | None = None,
    ) -> None:
        self._dataset, self._kept, self._features, self._rows, self._index = dataset, kept, features, rows, index
        self.name, self.skipped, self.changes = dataset.name, skipped or Skips(), changes or {}
        self._scope = lru_cache(_NUM_SCOPES)(self._find_scope)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def index(self) -> str:
        """As given to FAISS's index factory; `Flat` is exact."""
        return self._index.spec if self._index is not None else EXACT

    def path(self, index: int) -> str:
        """Return what names an image: its path where it is a file."""
        return self._dataset.named(self._kept[index])

    def caption(self, index: int) -> str:
        """Return the first caption of an image; empty if there is none."""
        try:
            return next(iter(self._dataset.captions(self._kept[index])), "")
        except DataError:
            return ""

    def read(self, index: int) -> bytes | Pixels:
        """Read an image; errors as in `Dataset.read`."""
        return self._dataset.read(self._kept[index]).image

    def like(self, index: int) -> Term:
        """Return the term that looks for images like one of the collection."""
        found = np.asarray(self._features[self._rows[index]])  # (D,) or (P, Q)
        return Term(1, found.reshape(-1, found.shape[-1]))

    def num_within(self, within: str) -> int:
        """Count the images that `find` searches; errors as in `find`."""
        return len(self._scope(within).rows)

    def use_quick_index(self, log: Callable[[str], None]) -> None:
        """Give a large collection that has no index one of `quick_spec`, in memory, and say so."""
        rows, dim = self._scope("").distinct, self._features.shape[-1]
        spec = quick_spec(len(rows), dim) if self._index is None and self._features.ndim == 2 else ""
        if spec:
            log(f"making an index {spec} of {len(rows)} images, for speed; --index Flat compares all of them instead")
            self._index = ApproximateIndex.build(spec, self._features, rows)

    def ask(self, terms: Sequence[Term], k: int, *, within: str = "") -> Question:
        """Prepare a search for the best images for the sum of some terms.

        Args:
            terms: at least one.
            k: how many images are wanted, at least 1.
            within: a folder, or a pattern for paths such as `holiday/*.jpg`, from any folder on; empty searches all.

        Raises:
            EvaluateError: no path matches `within`, or the terms cancel each other.
        """
        scope = self._scope(within)
        return Question(terms, None if self._features.ndim == 3 else _sum_of(terms), k, within, scope)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions of `ask`; those of one scope are compared together, which takes little longer than one.

        Returns:
            For each the numbers of images, best first, and their scores: the cosine with the sum of the unit vectors,
            signed; of token-wise models the mean of the signed scores of the terms.
        """
        together: dict[tuple[str, int], list[int]] = {}
        for index, question in enumerate(questions):
            together.setdefault((question.within, question.size), []).append(index)
        answers: list[Answer] = [([], [])] * len(questions)
        for (_, size), indices in together.items():
            chosen = [questions[index] for index in indices]
            if self._features.ndim == 3:
                found = [self._compare_tokens(question) for question in chosen]
            else:
                found = self._compare(chosen, size)
            for index, question, (scores, rows) in zip(indices, chosen, found, strict=True):
                answers[index] = _images_of(question, scores, rows)
        return answers

    def find(self, terms: Sequence[Term], k: int, *, within: str = "") -> Answer:
        """Ask and answer one question; see `ask` and `answer`."""
        return self.answer([self.ask(terms, k, within=within)])[0]

    def _compare(self, questions: Sequence[Question], size: int) -> list[Found]:
        queries = np.stack([question.features for question in questions if question.features is not None])  # (Q, D)
        scope, within = questions[0].scope, questions[0].within
        # A filter may leave few of an approximate index's candidates, so that exact scores are faster.
        search = search_exact if self._index is None or within else self._index.search
        return search(self._features, scope.distinct, queries, size)

    def _compare_tokens(self, question: Question) -> Found:
        rows = question.scope.distinct
        scores = [np.float32(term.sign) * self._score_tokens(rows, term.features) for term in question.terms]
        return best(np.mean(scores, axis=0), rows, question.k)

    def _score_tokens(self, rows: Rows, tokens: Vectors) -> Vectors:
        """Score images by the best patch for each token, averaged over the tokens (L, Q), → (R,)."""
        parts = np.array_split(rows, range(_CHUNK_IMAGES, len(rows), _CHUNK_IMAGES))
        return np.concatenate([(self._features[part] @ tokens.T).max(axis=1).mean(axis=1) for part in parts])

    def _find_scope(self, within: str) -> _Scope:
        indices = np.arange(len(self))
        if within:
            glob = within.rstrip("/")
            patterns = (glob, f"*/{glob}", f"{glob}/*", f"*/{glob}/*")
            expressions = [f"{re.escape(glob)}/", *map(translate, patterns)]  # a folder's name may look like a pattern
            is_inside = re.compile("|".join(expressions)).match
            indices = indices[[bool(is_inside(self.path(index))) for index in range(len(self))]]
        if not len(indices):
            raise EvaluateError(
                f"no image of {self.name} has a path like {within!r}",
                remedy="--within takes a folder or a pattern, such as holiday or 'holiday/*.png'",
            )
        indices = indices[np.argsort(self._rows[indices], kind="stable")]
        rows = self._rows[indices]
        return _Scope(indices, rows, np.unique(rows))


def _images_of(question: Question, scores: Vectors, rows: Rows) -> Answer:
    """Turn rows, best first, into the images that have them."""
    scope, k = question.scope, question.k
    firsts, lasts = (np.searchsorted(scope.rows, rows, side) for side in ("left", "right"))
    indices = [n for first, last in zip(firsts, lasts, strict=True) for n in scope.indices[first:last].tolist()]
    return indices[:k], np.repeat(scores, lasts - firsts)[:k].tolist()


def _sum_of(terms: Sequence[Term]) -> Vectors:
    """Add up unit vectors (1, D) by their signs, → unit length, (D,)."""
    if len(terms) == 1 and terms[0].sign > 0:
        only: Vectors = terms[0].features[0]
        return only
    total: Vectors = np.sum([term.sign * term.features[0] for term in terms], axis=0)
    norm = float(np.linalg.norm(total))
    if norm < _MIN_NORM:
        raise EvaluateError("what is looked for and what is not are the same", remedy="give --minus another text")
    return total / np.float32(norm)


def open_collection(
    model: PretrainedModel,
    dataset: Dataset | None,
    *,
    index: str = "",
    folder: Path | None = None,
    options: FeatureOptions = DEFAULTS,
) -> Collection:
    """Encode the images of a data set, or open a saved index of them.

    Args:
        model: a trained model; token-wise ones (FILIP) compare token by token, always exactly.
        dataset: the images; None opens the index saved in `folder` as it is.
        index: `Flat`, or another description for FAISS's index factory; empty takes that of `folder`, else `Flat`.
        folder: where an index is saved and brought up to date with the data set; None saves none.
        options: how features are computed.

    Raises:
        EvaluateError: no image can be read, the index cannot be made, or belongs to another model.
    """
    if model.token_wise and (folder is not None or index not in ("", EXACT)):
        raise EvaluateError(
            f"{f'--index {index}' if index else '--index-dir'} needs one vector per image; a token-wise model (FILIP) "
            "has one per patch",
            remedy="omit it, or use a model of another method",
        )
    if folder is not None:
        return _open_saved(model, dataset, index, folder, options)
    assert dataset is not None
    encode = encode_image_tokens if model.token_wise else image_features
    images = encode(model, dataset, options=options)
    vectors, rows = images.features.numpy(), np.arange(len(images.kept))  # (N, D), (N,)
    made = ApproximateIndex.build(index, vectors, rows) if index not in ("", EXACT) else None
    return Collection(
        dataset, images.kept, vectors, rows, index=made, skipped=_together(dataset.skipped, images.skipped)
    )


def _open_saved(
    model: PretrainedModel, dataset: Dataset | None, index: str, folder: Path, options: FeatureOptions
) -> Collection:
    """Open a saved index; where there is a data set, let it hold exactly the images of that first."""

    def work(store: VectorStore) -> Collection:
        if dataset is None:
            listed = store.listed()
            images: Dataset = FilesDataset([key for key, _, _ in listed], captions=lambda n: tuple(listed[n][1:2]))
            images.name = str(folder)
            rows = np.array([row for _, _, row in listed], dtype=np.int64)  # (N,)
            kept, changes, skipped = np.arange(len(rows)), dict[str, int](), store.skipped()
        else:
            images, found = dataset, update_store(store, model, dataset, embedder(model), options, is_shared=False)
            kept = np.flatnonzero(found.rows >= 0)  # (N,)
            rows, skipped = found.rows[kept], _together(dataset.skipped, found.skipped)
            changes = {
                "num_added": found.num_read - found.num_changed,
                "num_changed": found.num_changed,
                "num_removed": store.keep_asked(),
                "num_encoded": found.num_encoded,
            }
        vectors = store.vectors()  # (V, D)
        made = saved_index(store, vectors, np.unique(rows), index)
        return Collection(images, kept.tolist(), vectors, rows, index=made, skipped=skipped, changes=changes)

    if dataset is not None:
        return use_store(folder, model.fingerprint, model.name, work, log=options.log)
    with VectorStore(folder, model=model.fingerprint, model_name=model.name) as store:  # no images to rebuild it from
        return work(store)


def _together(first: Skips, second: Skips) -> Skips:
    both = Skips(first)
    both.add_all(second)
    return both
