"""Retrieval scores: images found by captions and captions by images."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from declip_cli.data.dataset import Dataset, Skips
from declip_cli.data.files_dataset import Subset
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.metrics import Ranks, median_rank, paired_ranks, recall_at
from declip_cli.evaluate.report import FLAT, Report
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.token_wise import TokenTexts, encode_image_tokens, encode_text_tokens, token_wise_ranks
from declip_cli.model.checkpoint import PretrainedModel

RECALLS = (1, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalReport(Report):
    """Scores of one data set; the fields of `declip retrieve --json`."""

    dataset: str
    model: str
    num_images: int
    num_texts: int
    scores: dict[str, Any] = field(metadata=FLAT)
    """As of `both_directions`."""
    folds: dict[str, Any] = field(metadata=FLAT)
    """`mean_of_N_folds`: the mean scores of the folds, where the set is also scored in folds; else empty."""
    skipped: Skips
    note: str | None
    """What a reader of the scores should know, such as which split it is."""
    seconds: float


def both_directions(ranks: Ranks) -> dict[str, Any]:
    """Score the ranks of both directions.

    Returns:
        `image_to_text` and `text_to_image`, each with `recall_at_1`, `recall_at_5`, `recall_at_10` (fractions of the
        queries with a right answer among the first k), `median_rank` and `mean_rank`; and `rsum`, the sum of the six
        recalls, at most 6.
    """
    scores: dict[str, Any] = {}
    for name, found in (("image_to_text", ranks.image_to_text), ("text_to_image", ranks.text_to_image)):
        recalls = {f"recall_at_{k}": recall_at(found, k) for k in RECALLS}
        scores[name] = recalls | {"median_rank": median_rank(found), "mean_rank": float(found.double().mean())}
    scores["rsum"] = sum(scores[name][f"recall_at_{k}"] for name in list(scores) for k in RECALLS)
    return scores


def _mean(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _mean([entry[key] for entry in entries])
        if isinstance(value, dict)
        else sum(entry[key] for entry in entries) / len(entries)
        for key, value in entries[0].items()
    }


def retrieve(model: PretrainedModel, dataset: Dataset, *, options: FeatureOptions = DEFAULTS) -> RetrievalReport:
    """Score how well images and captions find each other.

    A caption finds its image, an image any of its captions, if that is among the first k. Captions of unreadable
    images are omitted.

    Args:
        model: a trained model; token-wise ones (FILIP) are compared token by token.
        dataset: images and captions; images without any are counted as skipped.
        options: how features are computed.

    Raises:
        EvaluateError: no image has a caption, or none of them can be read.
    """
    started = time.perf_counter()
    pairs = read_pairs(dataset)
    encoded, size = _Encoded(model, pairs, options), dataset.fold_size
    count = num_folds(len(pairs.images), size)
    folds = [both_directions(encoded.ranks(fold * size, (fold + 1) * size)) for fold in range(count)]
    pairs.skipped.add_all(encoded.skipped)
    return RetrievalReport(
        dataset=dataset.name,
        model=model.name,
        num_images=len(encoded.indices),
        num_texts=len(encoded.image_ids),
        scores=both_directions(encoded.ranks(0, len(pairs.images))),
        folds={f"mean_of_{count}_folds": {"num_images": size} | _mean(folds)} if folds else {},
        skipped=pairs.skipped,
        note=dataset.note or None,
        seconds=time.perf_counter() - started,
    )


def num_folds(num_images: int, fold_size: int) -> int:
    """Count the folds that a set is also scored in: none where it would be a single one."""
    folds = num_images // fold_size if fold_size else 0
    return folds if folds > 1 else 0


@dataclass(frozen=True, slots=True)
class Pairs:
    """The images of a data set that have captions."""

    images: Dataset
    texts: list[str]
    """M captions, those of an image together."""
    image_ids: list[int]
    """The image of each caption, M numbers."""
    skipped: Skips


def read_pairs(dataset: Dataset) -> Pairs:
    """Read the captions of a data set.

    Raises:
        EvaluateError: there are none.
    """
    texts: list[str] = []
    image_ids: list[int] = []
    indices: list[int] = []
    skipped = Skips(dataset.skipped)
    for index in range(len(dataset)):
        try:
            captions = dataset.captions(index)
        except DataError as error:
            skipped.add(error.cause, dataset.named(index))
            continue
        if not captions:
            skipped.add("missing caption", dataset.named(index))
            continue
        texts += captions
        image_ids += [len(indices)] * len(captions)
        indices.append(index)
    if not indices:
        raise EvaluateError(
            f"no image with a caption in {dataset.name} ({skipped or 'empty'})",
            remedy='give it a captions.jsonl with lines {"file": "a.jpg", "captions": ["…"]}, '
            "or search it with --query TEXT",
        )
    images = dataset if len(indices) == len(dataset) else Subset(dataset, indices)
    return Pairs(images, texts, image_ids, skipped)


class _Encoded:
    """The images that can be read, and their captions: one embedding each, or one per patch and token."""

    def __init__(self, model: PretrainedModel, pairs: Pairs, options: FeatureOptions) -> None:
        images = (encode_image_tokens if model.token_wise else image_features)(model, pairs.images, options=options)
        rows = {index: row for row, index in enumerate(images.kept)}
        kept = [(text, rows[own]) for text, own in zip(pairs.texts, pairs.image_ids, strict=True) if own in rows]
        self.skipped = images.skipped
        self.indices = torch.tensor(images.kept, device=model.device)  # (N',)
        self.image_ids = torch.tensor([row for _, row in kept], device=model.device)  # (M',)
        self._images = images.features.to(model.device)  # (N', D) or (N', P, Q)
        encode = encode_text_tokens if model.token_wise else text_features
        self._texts: Tensor | TokenTexts = encode(model, [text for text, _ in kept], options=options).to(model.device)

    def ranks(self, first: int, last: int) -> Ranks:
        """Rank images number first to last - 1 of the set, and their captions, among themselves."""
        rows = ((self.indices >= first) & (self.indices < last)).nonzero()[:, 0]  # (n,)
        texts = torch.isin(self.image_ids, rows).nonzero()[:, 0]  # (m,)
        image_ids = torch.searchsorted(rows, self.image_ids[texts])  # (m,)
        if isinstance(self._texts, TokenTexts):
            return token_wise_ranks(self._images[rows], self._texts.select(texts), image_ids)
        return paired_ranks(self._images[rows], self._texts[texts], image_ids)
