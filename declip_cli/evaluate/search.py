"""Search: the images of a collection that texts and an image describe best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from declip_cli.data.dataset import Dataset, Pixels, Skips
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.evaluate.collection import Collection, Term, open_collection
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.report import FLAT, Report
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.token_wise import encode_image_tokens, encode_text_tokens
from declip_cli.model.checkpoint import PretrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is looked for: texts, an image, or both; and what is not."""

    texts: tuple[str, ...] = ()
    image: Path | None = None
    minus: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The query in one line: `dir/image.jpg + a dog - a cat`."""
        image = () if self.image is None else (str(self.image),)
        return describe_query((*image, *self.texts), self.minus)


def describe_query(wanted: Sequence[str], minus: Sequence[str]) -> str:
    """Write a query in one line."""
    return " - ".join((" + ".join(wanted), *minus))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit(Report):
    """One image found."""

    rank: int
    """1 is the best."""
    score: float
    """As of `Collection.find`."""
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
    """Images of the collection."""
    num_within: int | None = None
    """Those of them that `within` left to be searched; None without it."""
    changes: dict[str, int] = field(metadata=FLAT)
    """As of `Collection`."""
    skipped: Skips
    seconds: float


def search(
    model: PretrainedModel,
    dataset: Dataset | None,
    query: Query,
    *,
    k: int = 10,
    within: str = "",
    index: str = "",
    folder: Path | None = None,
    options: FeatureOptions = DEFAULTS,
) -> SearchReport:
    """Find the images of a data set that are most like a query.

    Args:
        model: as in `open_collection`, as `dataset`, `index`, `folder` and `options` are.
        dataset: the collection.
        query: texts and an image.
        k: how many hits are wanted; there are fewer in a smaller collection.
        within: as in `Collection.find`.
        index: kind of index.
        folder: where an index is saved.
        options: how features are computed.

    Raises:
        EvaluateError: as in `open_collection`, `encode_query` and `Collection.find`.
    """
    started = time.perf_counter()
    terms = encode_query(model, query, options=options)
    collection = open_collection(model, dataset, index=index, folder=folder, options=options)
    indices, scores = collection.find(terms, k, within=within)
    return SearchReport(
        query=query.words,
        collection=collection.name,
        model=model.name,
        index=collection.index,
        hits=[describe_hit(collection, *found) for found in zip(range(1, k + 1), indices, scores, strict=False)],
        num_indexed=len(collection),
        num_within=collection.num_within(within) if within else None,
        changes=collection.changes,
        skipped=collection.skipped,
        seconds=time.perf_counter() - started,
    )


def describe_hit(collection: Collection, rank: int, index: int, score: float) -> Hit:
    """Describe a hit: an image of a collection, by its index."""
    return Hit(
        rank=rank,
        score=score,
        path=collection.path(index),
        caption=collection.caption(index) or None,
        read=partial(collection.read, index),
    )


def encode_query(model: PretrainedModel, query: Query, *, options: FeatureOptions = DEFAULTS) -> list[Term]:
    """Encode the parts of a query, in the order image, texts, minus.

    Raises:
        EvaluateError: the image cannot be read.
    """
    alone, terms = options.alone(), list[Term]()
    if query.image is not None:
        encode = encode_image_tokens if model.token_wise else image_features
        features = encode(model, FilesDataset([query.image]), options=alone).features.numpy()  # (1, D) or (1, P, Q)
        terms.append(Term(1, features.reshape(-1, features.shape[-1])))
    texts = (*query.texts, *query.minus)
    signs = [1] * len(query.texts) + [-1] * len(query.minus)
    if not texts:
        parts: tuple[Tensor, ...] = ()
    elif model.token_wise:
        found = encode_text_tokens(model, texts, options=alone)
        parts = found.tokens.split(found.lengths.tolist())  # (L, Q) each
    else:
        parts = text_features(model, texts, options=alone).split(1)  # (1, D) each
    return terms + [Term(sign, part.numpy()) for sign, part in zip(signs, parts, strict=True)]
