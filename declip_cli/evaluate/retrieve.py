"""Retrieval scores: pictures found by captions and captions by pictures."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from declip_cli.data.dataset import Dataset, Skips
from declip_cli.data.files_dataset import Subset
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.features import FeatureOptions, ImageFeatures, image_features
from declip_cli.evaluate.metrics import median_rank, recall_at
from declip_cli.evaluate.ranking import Ranks, paired_ranks
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.token_wise import encode_image_tokens, encode_text_tokens, token_wise_ranks
from declip_cli.model.checkpoint import PretrainedModel

RECALLS = (1, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionScores:
    """Scores of one direction."""

    recall: dict[int, float]
    """k → fraction of the queries with a right answer among the first k."""
    median_rank: float
    mean_rank: float

    @staticmethod
    def of(ranks: Tensor) -> "DirectionScores":
        """Score ranks, (N,)."""
        return DirectionScores(
            recall={k: recall_at(ranks, k) for k in RECALLS},
            median_rank=median_rank(ranks),
            mean_rank=float(ranks.double().mean()),
        )

    def to_json(self) -> dict[str, float]:
        """Return `recall_at_1`, …, `median_rank`, `mean_rank`."""
        recalls = {f"recall_at_{k}": value for k, value in self.recall.items()}
        return recalls | {"median_rank": self.median_rank, "mean_rank": self.mean_rank}


@dataclass(frozen=True, slots=True, kw_only=True)
class BothDirections:
    """Scores of pictures → captions and captions → pictures."""

    image_to_text: DirectionScores
    text_to_image: DirectionScores

    @staticmethod
    def of(ranks: Ranks) -> "BothDirections":
        """Score the ranks of both directions."""
        return BothDirections(
            image_to_text=DirectionScores.of(ranks.image_to_text),
            text_to_image=DirectionScores.of(ranks.text_to_image),
        )

    def to_json(self) -> dict[str, Any]:
        """Return both directions and `rsum`, the sum of the six recalls as fractions, at most 6."""
        recalls = [*self.image_to_text.recall.values(), *self.text_to_image.recall.values()]
        return {
            "image_to_text": self.image_to_text.to_json(),
            "text_to_image": self.text_to_image.to_json(),
            "rsum": sum(recalls),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalReport:
    """Scores of one data set."""

    dataset: str
    model: str
    num_images: int
    num_texts: int
    scores: BothDirections
    folds: tuple[BothDirections, ...]
    """Scores of each fold, where the set is also scored in folds."""
    fold_size: int
    skipped: dict[str, dict[str, int | str]]
    seconds: float

    @property
    def score(self) -> float:
        """Text → image recall@1."""
        return self.scores.text_to_image.recall[1]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `declip retrieve --json`."""
        report: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "num_images": self.num_images,
            "num_texts": self.num_texts,
            **self.scores.to_json(),
        }
        if self.folds:
            report[f"mean_of_{len(self.folds)}_folds"] = {"num_images": self.fold_size} | _mean(
                [fold.to_json() for fold in self.folds]
            )
        if self.skipped:
            report["num_skipped"] = sum(int(entry["count"]) for entry in self.skipped.values())
            report["skipped"] = self.skipped
        report["seconds"] = self.seconds
        return report


def _mean(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _mean([entry[key] for entry in entries])
        if isinstance(value, dict)
        else sum(entry[key] for entry in entries) / len(entries)
        for key, value in entries[0].items()
    }


def retrieve(model: PretrainedModel, dataset: Dataset, *, options: FeatureOptions | None = None) -> RetrievalReport:
    """Score how well pictures and captions find each other.

    A picture counts as found by any of its captions' queries, a caption if any of the picture's captions is
    among the first k. Captions of unreadable pictures are left out.

    Args:
        model: a trained model; token-wise ones (FILIP) are compared token by token.
        dataset: images and captions; images without any are counted as skipped.
        options: batch size, precision, threads, cache.

    Returns:
        Recalls and ranks, both ways.

    Raises:
        EvaluateError: no image has a caption, or none of them can be read.
    """
    started = time.perf_counter()
    options = options or FeatureOptions()
    pairs = read_pairs(dataset)
    encoded: _Encoded = (_TokenWise if model.token_wise else _Whole)(model, pairs, options)
    size = dataset.fold_size
    folds = [encoded.scores(fold * size, (fold + 1) * size) for fold in range(num_folds(len(pairs.images), size))]
    pairs.skipped.add_all(encoded.images.skipped)
    return RetrievalReport(
        dataset=dataset.name,
        model=model.name,
        num_images=len(encoded.images.kept),
        num_texts=len(encoded.texts),
        scores=encoded.scores(0, len(pairs.images)),
        folds=tuple(folds),
        fold_size=size,
        skipped=pairs.skipped.to_json(),
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
    owners: list[int]
    """The image of each caption, M numbers."""
    skipped: Skips


def read_pairs(dataset: Dataset) -> Pairs:
    """Read the captions of a data set.

    Args:
        dataset: any.

    Returns:
        The images with captions, and what was skipped.

    Raises:
        EvaluateError: there are none.
    """
    texts: list[str] = []
    owners: list[int] = []
    numbers: list[int] = []
    skipped = Skips(dataset.skipped)
    for number in range(len(dataset)):
        try:
            captions = dataset.captions(number)
        except DataError as error:
            skipped.add(error.cause, dataset.named(number))
            continue
        if not captions:
            skipped.add("missing caption", dataset.named(number))
            continue
        texts += captions
        owners += [len(numbers)] * len(captions)
        numbers.append(number)
    if not numbers:
        raise EvaluateError(
            f"no image with a caption in {dataset.name} ({skipped or 'empty'})",
            remedy='give it a captions.jsonl with lines {"file": "a.jpg", "captions": ["…"]}, '
            "or search it with --query TEXT",
        )
    images = dataset if len(numbers) == len(dataset) else Subset(dataset, numbers)
    return Pairs(images, texts, owners, skipped)


class _Encoded(ABC):
    """Encoded pictures and the captions of those that can be read."""

    def __init__(self, pairs: Pairs, images: ImageFeatures, device: torch.device) -> None:
        self.images = images
        rows = {number: row for row, number in enumerate(images.kept)}
        kept = [(text, rows[own]) for text, own in zip(pairs.texts, pairs.owners, strict=True) if own in rows]
        self.texts = [text for text, _ in kept]
        self._numbers = torch.tensor(images.kept, device=device)  # (N',)
        self._owners = torch.tensor([row for _, row in kept], device=device)  # (M',)

    def scores(self, first: int, last: int) -> BothDirections:
        """Score pictures number first to last - 1 of the set, and their captions, among themselves."""
        rows = ((self._numbers >= first) & (self._numbers < last)).nonzero()[:, 0]  # (n,)
        texts = torch.isin(self._owners, rows).nonzero()[:, 0]  # (m,)
        owners = torch.searchsorted(rows, self._owners[texts])  # (m,)
        return BothDirections.of(self._ranks(rows, texts, owners))

    @abstractmethod
    def _ranks(self, rows: Tensor, texts: Tensor, owners: Tensor) -> Ranks: ...


class _Whole(_Encoded):
    """One embedding per picture and per text."""

    def __init__(self, model: PretrainedModel, pairs: Pairs, options: FeatureOptions) -> None:
        device = next(model.encoder.parameters()).device
        super().__init__(pairs, image_features(model, pairs.images, options=options), device)
        self._image_embeds = self.images.features.to(device)  # (N', D)
        self._text_embeds = text_features(model, self.texts, options=options).to(device)  # (M', D)

    def _ranks(self, rows: Tensor, texts: Tensor, owners: Tensor) -> Ranks:
        return paired_ranks(self._image_embeds[rows], self._text_embeds[texts], owners)


class _TokenWise(_Encoded):
    """One embedding per patch and per token."""

    def __init__(self, model: PretrainedModel, pairs: Pairs, options: FeatureOptions) -> None:
        device = next(model.encoder.parameters()).device
        super().__init__(pairs, encode_image_tokens(model, pairs.images, options=options), device)
        self._image_tokens = self.images.features.to(device)  # (N', P, Q)
        self._text_tokens = encode_text_tokens(model, self.texts, options=options).to(device)

    def _ranks(self, rows: Tensor, texts: Tensor, owners: Tensor) -> Ranks:
        return token_wise_ranks(self._image_tokens[rows], self._text_tokens.select(texts), owners)
