"""Search: the images of a collection that a text or an image describes best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from declip_cli.data.dataset import Dataset, Pixels, Skips
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.data.sources.records import read_picture
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.features import (
    EMBEDDING,
    FeatureOptions,
    ImageFeatures,
    embedder,
    image_features,
    locate_images,
    update_store,
)
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, saved_index, search_exact
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
class Hit:
    """One image found."""

    rank: int
    """1 is the best."""
    score: float
    """Cosine similarity (token-wise models: their token-wise score)."""
    path: str
    caption: str
    read: Callable[[], bytes | Pixels] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return rank, score, path and, if there is one, the caption."""
        hit: dict[str, Any] = {"rank": self.rank, "score": self.score, "path": self.path}
        return hit | ({"caption": self.caption} if self.caption else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport:
    """What was found."""

    query: str
    collection: str
    model: str
    index: str
    """As given to faiss's index factory; `Flat` is exact."""
    hits: list[Hit]
    num_indexed: int
    """Images that were searched."""
    changes: dict[str, int]
    """What was added to, changed in and removed from a saved index; empty without one."""
    skipped: dict[str, dict[str, int | str]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `declip retrieve --query --json`."""
        report: dict[str, Any] = {
            "query": self.query,
            "collection": self.collection,
            "model": self.model,
            "index": self.index,
            "hits": [hit.to_json() for hit in self.hits],
            "num_indexed": self.num_indexed,
        }
        report |= self.changes
        if self.skipped:
            report["num_skipped"] = sum(int(entry["count"]) for entry in self.skipped.values())
            report["skipped"] = self.skipped
        report["seconds"] = self.seconds
        return report


def search(
    model: PretrainedModel,
    dataset: Dataset,
    query: Query,
    *,
    k: int = 10,
    index: str = EXACT,
    options: FeatureOptions | None = None,
) -> SearchReport:
    """Find the images of a data set that are most like a query.

    Args:
        model: a trained model; token-wise ones (FILIP) compare token by token, always exactly.
        dataset: the collection.
        query: text or image.
        k: how many hits are wanted; there are fewer in a smaller collection.
        index: `Flat`, or another description for FAISS's index factory.
        options: batch size, precision, threads, store.

    Returns:
        The hits, best first.

    Raises:
        EvaluateError: no image can be read, or the index cannot be made.
    """
    started, options = time.perf_counter(), options or FeatureOptions()
    _need_exact(index, model)
    if model.token_wise:
        images, scores = _token_wise_scores(model, dataset, query, options)
        order = np.argsort(-scores, kind="stable")[:k]
        numbers, best, skipped = np.array(images.kept)[order], scores[order], images.skipped
        num_indexed = len(images.kept)
    else:
        vector = query_vector(model, query, options)  # (D,)
        found = locate_images(model, dataset, embedder(model), label=EMBEDDING, options=options)
        rows = np.unique(found.rows[found.rows >= 0])  # (n,)
        made = ApproximateIndex.build(index, found.vectors, rows) if index != EXACT else None
        numbers, best = _numbers(found.rows, *_nearest(made, found.vectors, rows, vector, k), k)
        skipped, num_indexed = found.skipped, int((found.rows >= 0).sum())
    return SearchReport(
        query=query.words,
        collection=dataset.name,
        model=model.name,
        index=index,
        hits=_hits([_described(dataset, number) for number in numbers.tolist()], best),
        num_indexed=num_indexed,
        changes={},
        skipped=_together(dataset.skipped, skipped).to_json(),
        seconds=time.perf_counter() - started,
    )


def _nearest(
    index: ApproximateIndex | None, vectors: Vectors, rows: Rows, vector: Vectors, k: int
) -> tuple[Vectors, Rows]:
    if index is None:
        return search_exact(vectors, rows, vector, k)
    return index.search(vectors, rows, vector, k)


def _numbers(rows: Rows, scores: Vectors, found: Rows, k: int) -> tuple[Rows, Vectors]:
    """Turn rows that were found into numbers of images, those of the same content by number, and their scores."""
    by_row = np.argsort(rows, kind="stable")
    firsts, lasts = (np.searchsorted(rows[by_row], found, side) for side in ("left", "right"))
    numbers = [by_row[first:last] for first, last in zip(firsts, lasts, strict=True)]
    return np.concatenate(numbers)[:k], np.repeat(scores, lasts - firsts)[:k]


def _described(dataset: Dataset, number: int) -> tuple[str, str, Callable[[], bytes | Pixels]]:
    try:
        caption = next(iter(dataset.captions(number)), "")
    except DataError:
        caption = ""
    return dataset.named(number), caption, lambda: dataset.read(number).image


def _hits(found: Sequence[tuple[str, str, Callable[[], bytes | Pixels]]], scores: Vectors) -> list[Hit]:
    return [
        Hit(rank=rank, score=score, path=path, caption=caption, read=read)
        for rank, ((path, caption, read), score) in enumerate(zip(found, scores.tolist(), strict=True), start=1)
    ]


def _together(first: Skips, second: Skips) -> Skips:
    both = Skips(first)
    both.add_all(second)
    return both


def _need_exact(index: str, model: PretrainedModel) -> None:
    if model.token_wise and index != EXACT:
        option = index if index.startswith("--") else f"--index {index}"
        raise EvaluateError(
            f"{option} needs one vector per image; a token-wise model (FILIP) has one per patch",
            remedy="omit it, or use a model of another method",
        )


def search_saved(
    model: PretrainedModel,
    dataset: Dataset | None,
    query: Query,
    *,
    folder: Path,
    k: int = 10,
    index: str = "",
    options: FeatureOptions | None = None,
) -> SearchReport:
    """Bring a saved index up to date with a data set and search it.

    Args:
        model: a trained model with one embedding per image.
        dataset: what the index shall hold; None searches it as it is.
        query: text or image.
        folder: made if it does not exist.
        k: how many hits are wanted.
        index: as of `search`; empty keeps the saved one's.
        options: as of `search`.

    Returns:
        The hits and what changed.

    Raises:
        EvaluateError: it belongs to another model, cannot be made, or holds no image.
    """
    started, options = time.perf_counter(), options or FeatureOptions()
    _need_exact(index or "--index-dir", model)
    name, vector = dataset.name if dataset is not None else str(folder), query_vector(model, query, options)  # (D,)

    def work(store: VectorStore) -> SearchReport:
        changes, skipped = _follow(store, model, dataset, options) if dataset is not None else ({}, store.skipped())
        hits, num_indexed, spec = _search_store(store, index, vector, k)
        return SearchReport(
            query=query.words,
            collection=name,
            model=model.name,
            index=spec,
            hits=hits,
            num_indexed=num_indexed,
            changes=changes,
            skipped=skipped.to_json(),
            seconds=time.perf_counter() - started,
        )

    if dataset is not None:
        return use_store(folder, model.fingerprint, model.name, work, say=options.say)
    with VectorStore(folder, model=model.fingerprint, model_name=model.name) as store:  # no images to make it anew from
        return work(store)


def _search_store(store: VectorStore, index: str, vector: Vectors, k: int) -> tuple[list[Hit], int, str]:
    listed, vectors = store.snapshot()  # (V, D)
    rows_of = np.array([row for _, _, row in listed], dtype=np.int64)  # (N,)
    rows = np.unique(rows_of)  # (n,)
    made = saved_index(store, vectors, rows, index)
    numbers, best = _numbers(rows_of, *_nearest(made, vectors, rows, vector, k), k)
    found = [(path, caption, partial(read_picture, path)) for path, caption, _ in (listed[n] for n in numbers.tolist())]
    return _hits(found, best), len(listed), made.spec if made is not None else EXACT


def _follow(
    store: VectorStore, model: PretrainedModel, dataset: Dataset, options: FeatureOptions
) -> tuple[dict[str, int], Skips]:
    """Make a saved index hold exactly the images of a data set; say what changed and what was skipped."""
    found = update_store(store, model, dataset, embedder(model), options, is_shared=False)
    num_removed = store.keep_asked()
    changes = {
        "num_added": found.num_read - found.num_changed,
        "num_changed": found.num_changed,
        "num_removed": num_removed,
        "num_encoded": found.num_encoded,
    }
    return changes, _together(dataset.skipped, found.skipped)


def query_vector(model: PretrainedModel, query: Query, options: FeatureOptions) -> Vectors:
    """Encode what is looked for.

    Args:
        model: a model with one embedding per image and text.
        query: text or image.
        options: precision.

    Returns:
        Unit length, float32, (D,).

    Raises:
        EvaluateError: the image cannot be read.
    """
    alone = replace(options, progress=None, use_cache=False)
    if query.image is None:
        return text_features(model, [query.text], options=alone)[0].numpy()
    return image_features(model, FilesDataset([query.image]), options=alone).features[0].numpy()


def _token_wise_scores(
    model: PretrainedModel, dataset: Dataset, query: Query, options: FeatureOptions
) -> tuple[ImageFeatures, Vectors]:
    """Score images by the best patch for each token, or patch, of the query, averaged over these; (N',)."""
    alone = replace(options, progress=None, use_cache=False)
    if query.image is None:
        tokens = encode_text_tokens(model, [query.text], options=alone).tokens  # (L, Q)
    else:
        tokens = encode_image_tokens(model, FilesDataset([query.image]), options=alone).features[0]  # (P, Q)
    images = encode_image_tokens(model, dataset, options=options)
    scores = [(patches @ tokens.T).amax(1).mean(1) for patches in images.features.split(_CHUNK_IMAGES)]
    return images, torch.cat(scores).numpy()
