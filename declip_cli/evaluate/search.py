"""Search: the images of a collection that a text or an image describes best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from declip_cli.data.dataset import Dataset, Pixels, Skips
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.data.sources.records import read_picture
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import embedder, image_features, update_store
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, saved_index, search_exact
from declip_cli.evaluate.report import FLAT, Report
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.token_wise import encode_image_tokens, encode_text_tokens
from declip_cli.evaluate.vectors import Rows, Vectors, VectorStore, use_store
from declip_cli.model.checkpoint import PretrainedModel

_CHUNK_IMAGES = 1024
"""Images compared with a query token by token at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is looked for: a text, or an image."""

    text: str = ""
    image: Path | None = None

    @property
    def words(self) -> str:
        """The text, or the image's path."""
        return self.text if self.image is None else str(self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit(Report):
    """One image found."""

    rank: int
    """1 is the best."""
    score: float
    """Cosine similarity (token-wise models: their token-wise score)."""
    path: str
    caption: str | None
    read: Callable[[], bytes | Pixels] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport(Report):
    """What was found; the fields of `declip retrieve --query --json`."""

    query: str
    collection: str
    model: str
    index: str
    """As given to faiss's index factory; `Flat` is exact."""
    hits: list[Hit]
    num_indexed: int
    """Images that were searched."""
    changes: dict[str, int] = field(metadata=FLAT)
    """`num_added`, `num_changed`, `num_removed`, `num_encoded` of a saved index; empty without one."""
    skipped: Skips
    seconds: float


def search(
    model: PretrainedModel,
    dataset: Dataset | None,
    query: Query,
    *,
    k: int = 10,
    index: str = "",
    folder: Path | None = None,
    options: FeatureOptions = DEFAULTS,
) -> SearchReport:
    """Find the images of a data set that are most like a query.

    Args:
        model: a trained model; token-wise ones (FILIP) compare token by token, always exactly.
        dataset: the collection; None searches the index saved in `folder` as it is.
        query: text or image.
        k: how many hits are wanted; there are fewer in a smaller collection.
        index: `Flat`, or another description for FAISS's index factory; empty takes that of `folder`, else `Flat`.
        folder: where an index is saved and brought up to date with the data set; None saves none.
        options: how features are computed.

    Raises:
        EvaluateError: no image can be read, the index cannot be made, or belongs to another model.
    """
    started = time.perf_counter()
    if model.token_wise and (folder is not None or index not in ("", EXACT)):
        raise EvaluateError(
            f"{f'--index {index}' if index else '--index-dir'} needs one vector per image; a token-wise model (FILIP) "
            "has one per patch",
            remedy="omit it, or use a model of another method",
        )
    if model.token_wise:
        assert dataset is not None
        found = _search_tokens(model, dataset, query, k, options)
    elif folder is not None:
        found = _search_saved(model, dataset, query_vector(model, query, options), k, index, folder, options)
    else:
        assert dataset is not None
        found = _search_once(model, dataset, query_vector(model, query, options), k, index or EXACT, options)
    return SearchReport(
        query=query.words,
        collection=dataset.name if dataset is not None else str(folder),
        model=model.name,
        index=found.index,
        hits=found.hits,
        num_indexed=found.num_indexed,
        changes=found.changes,
        skipped=found.skipped,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    hits: list[Hit]
    num_indexed: int
    index: str
    skipped: Skips
    changes: dict[str, int] = field(default_factory=dict)


def _search_once(
    model: PretrainedModel, dataset: Dataset, query: Vectors, k: int, index: str, options: FeatureOptions
) -> _Found:
    images = image_features(model, dataset, options=options)
    vectors, rows = images.features.numpy(), np.arange(len(images.kept))  # (N', D), (N',)
    made = ApproximateIndex.build(index, vectors, rows) if index != EXACT else None
    found, scores = _nearest(made, vectors, rows, query, k)
    hits = _hits([_described(dataset, images.kept[row]) for row in found], scores)
    return _Found(hits, len(rows), index, _together(dataset.skipped, images.skipped))


def _search_saved(
    model: PretrainedModel,
    dataset: Dataset | None,
    query: Vectors,
    k: int,
    index: str,
    folder: Path,
    options: FeatureOptions,
) -> _Found:
    """Search a saved index; where there is a data set, let it hold exactly the images of that first."""

    def work(store: VectorStore) -> _Found:
        changes, skipped = _follow(store, model, dataset, options) if dataset is not None else ({}, store.skipped())
        listed, vectors = store.listed(), store.vectors()  # (V, D)
        rows = np.array([row for _, _, row in listed], dtype=np.int64)  # (N,)
        made = saved_index(store, vectors, np.unique(rows), index)
        numbers, scores = _nearest(made, vectors, rows, query, k)
        found = [(path, caption, partial(read_picture, path)) for path, caption, _ in (listed[n] for n in numbers)]
        return _Found(_hits(found, scores), len(listed), made.spec if made is not None else EXACT, skipped, changes)

    if dataset is not None:
        return use_store(folder, model.fingerprint, model.name, work, say=options.say)
    with VectorStore(folder, model=model.fingerprint, model_name=model.name) as store:  # no images to make it anew from
        return work(store)


def _follow(
    store: VectorStore, model: PretrainedModel, dataset: Dataset, options: FeatureOptions
) -> tuple[dict[str, int], Skips]:
    """Make a saved index hold exactly the images of a data set; say what changed and what was skipped."""
    found = update_store(store, model, dataset, embedder(model), options, is_shared=False)
    changes = {
        "num_added": found.num_read - found.num_changed,
        "num_changed": found.num_changed,
        "num_removed": store.keep_asked(),
        "num_encoded": found.num_encoded,
    }
    return changes, _together(dataset.skipped, found.skipped)


def _search_tokens(model: PretrainedModel, dataset: Dataset, query: Query, k: int, options: FeatureOptions) -> _Found:
    """Score images by the best patch for each token, or patch, of the query, averaged over these."""
    if query.image is None:
        tokens = encode_text_tokens(model, [query.text], options=options.alone()).tokens  # (L, Q)
    else:
        tokens = encode_image_tokens(model, FilesDataset([query.image]), options=options.alone()).features[0]  # (P, Q)
    found = encode_image_tokens(model, dataset, options=options)
    parts = [(patches @ tokens.T).amax(1).mean(1) for patches in found.features.split(_CHUNK_IMAGES)]
    scores = torch.cat(parts).numpy()  # (N',)
    order = np.argsort(-scores, kind="stable")[:k]
    images = [_described(dataset, found.kept[row]) for row in order.tolist()]
    skipped = _together(dataset.skipped, found.skipped)
    return _Found(_hits(images, scores[order].tolist()), len(scores), EXACT, skipped)


def _nearest(
    index: ApproximateIndex | None, vectors: Vectors, rows: Rows, query: Vectors, k: int
) -> tuple[list[int], list[float]]:
    """Find the best images by their rows (N,): their numbers, of the same content in order, and scores."""
    search_rows = search_exact if index is None else index.search
    scores, found = search_rows(vectors, np.unique(rows), query, k)  # (K,), (K,)
    by_row = np.argsort(rows, kind="stable")
    firsts, lasts = (np.searchsorted(rows[by_row], found, side) for side in ("left", "right"))
    numbers = [number for first, last in zip(firsts, lasts, strict=True) for number in by_row[first:last].tolist()]
    return numbers[:k], np.repeat(scores, lasts - firsts)[:k].tolist()


def _hits(images: Sequence[tuple[str, str, Callable[[], bytes | Pixels]]], scores: Sequence[float]) -> list[Hit]:
    return [
        Hit(rank=rank, score=score, path=path, caption=caption or None, read=read)
        for rank, ((path, caption, read), score) in enumerate(zip(images, scores, strict=True), start=1)
    ]


def _described(dataset: Dataset, number: int) -> tuple[str, str, Callable[[], bytes | Pixels]]:
    """Return an image's path, its caption and what reads it."""
    try:
        caption = next(iter(dataset.captions(number)), "")
    except DataError:
        caption = ""
    return dataset.named(number), caption, lambda: dataset.read(number).image


def _together(first: Skips, second: Skips) -> Skips:
    both = Skips(first)
    both.add_all(second)
    return both


def query_vector(model: PretrainedModel, query: Query, options: FeatureOptions) -> Vectors:
    """Encode what is looked for with a model of one embedding per image and text: unit length, float32, (D,).

    Raises:
        EvaluateError: the image cannot be read.
    """
    if query.image is None:
        return text_features(model, [query.text], options=options.alone())[0].numpy()
    return image_features(model, FilesDataset([query.image]), options=options.alone()).features[0].numpy()
