"""Search: the pictures of a collection that a text or a picture describes best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.dataset import Dataset, Pixels
from declip_cli.data.sources.records import read_picture
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.feature_cache import content_key, to_bytes
from declip_cli.evaluate.features import (
    FeatureOptions,
    ImageFeatures,
    ImageInput,
    image_features,
    map_images,
    text_features,
)
from declip_cli.evaluate.index_folder import IndexFolder, Match
from declip_cli.evaluate.listed import ListedPicture, PictureList, list_dataset
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, Rows, Vectors, search_exact
from declip_cli.evaluate.token_wise import encode_image_tokens, encode_text_tokens
from declip_cli.model.checkpoint import PretrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is looked for: a text, or a picture."""

    text: str = ""
    image: Path | None = None

    @property
    def words(self) -> str:
        """The text, or the picture's path."""
        return self.text if self.image is None else str(self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One picture found."""

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
    """Pictures that were searched."""
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
        query: text or picture.
        k: how many hits are wanted; there are fewer in a smaller collection.
        index: `Flat`, or another description for faiss's index factory.
        options: batch size, precision, threads, cache.

    Returns:
        The hits, best first.

    Raises:
        EvaluateError: no picture can be read, or the index cannot be made.
    """
    started, listed = time.perf_counter(), list_dataset(dataset)
    options = options or FeatureOptions()
    inputs = [(picture.path, picture.read) for picture in listed.pictures]
    if model.token_wise:
        _need_exact(index)
        found = _token_wise_scores(model, inputs, query, options)
        scores = found.features[:, 0].numpy()  # (N',)
        rows = np.argsort(-scores, kind="stable")[:k]
        best = scores[rows]
    else:
        vector = query_vector(model, query, options)  # (D,)
        found = image_features(model, inputs, options=options)
        best, rows = _nearest(found.features.numpy(), vector.numpy(), k, index)
    pictures = [listed.pictures[found.kept[row]] for row in rows.tolist()]
    return SearchReport(
        query=query.words,
        collection=listed.name,
        model=model.name,
        index=index,
        hits=make_hits(pictures, best.tolist()),
        num_indexed=len(found.kept),
        changes={},
        skipped=listed.skipped.to_json() | found.skipped_to_json(),
        seconds=time.perf_counter() - started,
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
        model: a trained model with one embedding per picture.
        dataset: what the index shall hold; None searches what it holds, without a look at the pictures.
        query: text or picture.
        folder: of the index; made if it does not exist.
        k: how many hits are wanted.
        index: `Flat`, or another description for faiss's index factory; empty keeps the saved one's.
        options: batch size, precision, threads; vectors are kept in the index and not in the cache.

    Returns:
        The hits, best first, and what changed in the index.

    Raises:
        EvaluateError: the index belongs to another model, cannot be made, or holds no picture.
    """
    started = time.perf_counter()
    if model.token_wise:
        _need_exact(index or "--index-dir")
    options = replace(options or FeatureOptions(), use_cache=False)
    listed = list_dataset(dataset) if dataset is not None else None
    encode = partial(image_features, model, options=replace(options, progress=None))
    with IndexFolder(folder, fingerprint=model.fingerprint, model_name=model.name) as saved:
        changes = saved.update(listed.pictures, encode, progress=options.progress).to_json() if listed else {}
        saved.rebuild(index)
        matches = saved.search(query_vector(model, query, options).numpy(), k)
        return SearchReport(
            query=query.words,
            collection=listed.name if listed else str(folder),
            model=model.name,
            index=saved.spec,
            hits=make_hits(_matched(matches, listed), [match.score for match in matches]),
            num_indexed=len(saved),
            changes=changes,
            skipped=(listed.skipped.to_json() if listed else {}) | saved.skipped(),
            seconds=time.perf_counter() - started,
        )


def _matched(matches: Sequence[Match], listed: PictureList | None) -> list[ListedPicture]:
    readers = {picture.path: picture.read for picture in listed.pictures} if listed else {}
    return [
        ListedPicture(match.path, readers.get(match.path) or partial(read_picture, match.path), "", match.caption)
        for match in matches
    ]


def _need_exact(index: str) -> None:
    if index != EXACT:
        option = index if index.startswith("--") else f"--index {index}"
        raise EvaluateError(
            f"{option} needs one vector per picture; a token-wise model (FILIP) has one per patch",
            remedy="leave it away, or use a model of another method",
        )


def _nearest(features: Vectors, vector: Vectors, k: int, index: str) -> tuple[Vectors, Rows]:
    none_dead = np.empty(0, dtype=np.int64)
    if index == EXACT:
        return search_exact(features, vector, k, dead=none_dead)
    return ApproximateIndex.build(index, features).search(features, vector, k, dead=none_dead)


def make_hits(pictures: Sequence[ListedPicture], scores: Sequence[float]) -> list[Hit]:
    """Number pictures in order.

    Args:
        pictures: best first.
        scores: of each.

    Returns:
        The hits.
    """
    return [
        Hit(rank=rank, score=score, path=picture.path, caption=picture.caption, read=picture.read)
        for rank, (picture, score) in enumerate(zip(pictures, scores, strict=True), start=1)
    ]


def query_vector(model: PretrainedModel, query: Query, options: FeatureOptions) -> Tensor:
    """Encode what is looked for.

    Args:
        model: a model with one embedding per picture and text.
        query: text or picture.
        options: precision, cache.

    Returns:
        Unit length, float32 on the CPU, (D,).

    Raises:
        EvaluateError: the picture cannot be read.
    """
    quiet = replace(options, progress=None)
    if query.image is None:
        return text_features(model, [query.text], options=quiet)[0]
    inputs = [(str(query.image), partial(read_picture, str(query.image)))]
    return image_features(model, inputs, options=quiet).features[0]


def _token_wise_scores(
    model: PretrainedModel, inputs: Sequence[ImageInput], query: Query, options: FeatureOptions
) -> ImageFeatures:
    """Score pictures by the best patch for each token, or patch, of the query, averaged over these; (N', 1)."""
    quiet = replace(options, progress=None)
    if query.image is None:
        tokens = encode_text_tokens(model, [query.text], options=quiet).tokens  # (L, Q)
    else:
        own = [(str(query.image), partial(read_picture, str(query.image)))]
        tokens = encode_image_tokens(model, own, options=quiet).features[0]  # (P, Q)
    tokens = tokens.to(next(model.encoder.parameters()).device)

    def encode(images: Tensor) -> Tensor:
        patches = F.normalize(model.encoder.encode_image_tokens(images).float(), dim=-1)  # (B, P, Q)
        return (patches @ tokens.T).amax(1).mean(1, keepdim=True)  # (B, 1)

    return map_images(model, inputs, encode, label=content_key(["search", to_bytes(tokens)]), options=options)
