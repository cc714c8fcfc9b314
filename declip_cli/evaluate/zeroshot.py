"""Zero-shot classification: pictures against the prompts of classes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from declip_cli.data.catalogue import classified
from declip_cli.data.dataset import Classes, Dataset, Metric
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.features import FeatureOptions, ImageFeatures, content_key, image_features, map_images
from declip_cli.evaluate.metrics import chance_accuracy, mean_per_class_accuracy, top_k_accuracy
from declip_cli.evaluate.prompts import Prompts, build_classifier, build_token_classifier, make_prompts
from declip_cli.evaluate.texts import count_cut
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import resolve_precision

DEFAULT_TEMPLATES = "80"
"""For sets without templates of their own."""
_TOP_K = 5
_CHUNK_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The best classes of each scored picture."""

    keys: list[str]
    """What names each picture, N'."""
    labels: Tensor
    """The right class, int64, (N',)."""
    ranked: Tensor
    """Classes, best first, int64, (N', K)."""
    scores: Tensor
    """Their cosine similarity (token-wise models: their token-wise score), float32, (N', K)."""
    class_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotReport:
    """Scores of one data set."""

    dataset: str
    split: str
    model: str
    num_images: int
    """Pictures that were scored; unreadable ones are in `skipped`."""
    num_classes: int
    num_templates: int
    templates: str
    """Which prompts: an ensemble or a file as the user named it, or `own` for the set's."""
    num_cut: int
    """Prompts longer than the model reads; their ends were left out."""
    precision: str
    """Number format of the forward passes: fp32 or bf16."""
    metric: Metric
    top1: float
    top5: float | None
    """None below five classes."""
    mean_per_class: float
    skipped: dict[str, dict[str, int | str]]
    note: str
    seconds: float
    predictions: Predictions = field(repr=False)

    @property
    def score(self) -> float:
        """What papers report for this set: `top1` or `mean_per_class`."""
        return self.mean_per_class if self.metric == "mean_per_class" else self.top1

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `declip zeroshot --json`."""
        report: dict[str, Any] = {
            "dataset": self.dataset,
            "split": self.split,
            "model": self.model,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "num_templates": self.num_templates,
            "templates": self.templates,
            "precision": self.precision,
            "metric": self.metric,
            "score": self.score,
            "top1": self.top1,
        }
        if self.top5 is not None:
            report["top5"] = self.top5
        report["mean_per_class"] = self.mean_per_class
        report["chance_top1"] = chance_accuracy(self.num_classes)
        if self.top5 is not None:
            report["chance_top5"] = chance_accuracy(self.num_classes, _TOP_K)
        if self.num_cut:
            report["num_prompts_cut"] = self.num_cut
        if self.skipped:
            report["num_skipped"] = sum(int(entry["count"]) for entry in self.skipped.values())
            report["skipped"] = self.skipped
        if self.note:
            report["note"] = self.note
        report["seconds"] = self.seconds
        return report


def zeroshot(
    model: PretrainedModel,
    dataset: Dataset,
    *,
    templates: str | Sequence[str] = "",
    options: FeatureOptions | None = None,
) -> ZeroshotReport:
    """Classify the pictures of a data set by the prompts of its classes.

    Args:
        model: a trained model; token-wise ones (FILIP) are compared token by token.
        dataset: images with labels.
        templates: as of `make_prompts`; empty takes the set's own, else OpenAI's 80.
        options: batch size, precision, threads, cache.

    Returns:
        Accuracies and predictions.

    Raises:
        EvaluateError: unusable prompts or pictures.

    Source: CLIP, arXiv 2103.00020, section 3.1.
    """
    started = time.perf_counter()
    options = options or FeatureOptions()
    dataset = classified(dataset)
    classes = dataset.classes or Classes(names=())
    chosen = templates or classes.templates or DEFAULT_TEMPLATES
    prompts = make_prompts(classes.names, chosen)
    predictions, skipped = _predict(model, dataset, prompts, options)
    ranked, labels, num_classes = predictions.ranked, predictions.labels, len(classes.names)
    return ZeroshotReport(
        dataset=dataset.name,
        split=dataset.split,
        model=model.name,
        num_images=len(labels),
        num_classes=num_classes,
        num_templates=prompts.num_templates,
        templates=chosen if isinstance(chosen, str) else "own",
        num_cut=count_cut(prompts.flat(), model.context_length),
        precision=resolve_precision(options.precision, next(model.encoder.parameters()).device),
        metric=classes.metric,
        top1=top_k_accuracy(ranked, labels, 1),
        top5=top_k_accuracy(ranked, labels, _TOP_K) if has_top5(num_classes) else None,
        mean_per_class=mean_per_class_accuracy(ranked[:, 0], labels, num_classes),
        skipped=skipped,
        note=dataset.note,
        seconds=time.perf_counter() - started,
        predictions=predictions,
    )


def has_top5(num_classes: int) -> bool:
    """Say whether there are enough classes for `top5`."""
    return num_classes >= _TOP_K


def _predict(
    model: PretrainedModel, dataset: Dataset, prompts: Prompts, options: FeatureOptions
) -> tuple[Predictions, dict[str, dict[str, int | str]]]:
    names = dataset.classes.names if dataset.classes is not None else ()
    if len(names) < 2:
        raise EvaluateError(
            f"{dataset.name} has only the class {names[0]!r}, there is nothing to tell apart",
            remedy="add a second class",
        )
    rank = _rank_token_wise if model.token_wise else _rank_whole
    ranked, scores, images = rank(model, dataset, prompts, options)
    predictions = Predictions(
        keys=[dataset.named(number) for number in images.kept],
        labels=torch.tensor([dataset.labels[number] for number in images.kept]),  # (N',)
        ranked=ranked,
        scores=scores,
        class_names=names,
    )
    return predictions, images.skipped.to_json()


def _rank_whole(
    model: PretrainedModel, dataset: Dataset, prompts: Prompts, options: FeatureOptions
) -> tuple[Tensor, Tensor, ImageFeatures]:
    classes = build_classifier(model, prompts, options=options)  # (C, D)
    images = image_features(model, dataset, options=options)
    ranked, scores = _rank(images.features, classes)
    return ranked, scores, images


def _rank_token_wise(
    model: PretrainedModel, dataset: Dataset, prompts: Prompts, options: FeatureOptions
) -> tuple[Tensor, Tensor, ImageFeatures]:
    classes = build_token_classifier(model, prompts, options=options)
    here = classes.to(next(model.encoder.parameters()).device)

    def encode(pixels: Tensor) -> Tensor:  # (B, S, S, 3) -> (B, C)
        return here.score(model.encoder.encode_image_tokens(pixels))

    label = content_key(["token-wise scores", *map(content_key, prompts.by_class)])
    images = map_images(model, dataset, encode, label=label, options=options)
    scores, ranked = images.features.topk(min(_TOP_K, images.features.shape[1]))
    return ranked, scores, images


def _rank(features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best classes of each picture and their cosines, without one large score matrix."""
    best = [
        (chunk @ classes.T).topk(min(_TOP_K, len(classes)))  # (N'', C) -> (N'', K)
        for chunk in features.split(_CHUNK_SIZE)
    ]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])
