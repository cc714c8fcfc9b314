"""Linear probe: a linear classifier on frozen features, as in CLIP's appendix A.3."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.dataset import Metric, Skips
from declip_cli.evaluate.encoding import DEFAULTS, Encode, FeatureOptions
from declip_cli.evaluate.features import map_images
from declip_cli.evaluate.logistic import LogisticFit, LogisticProblem
from declip_cli.evaluate.metrics import mean_per_class_accuracy, top_k_accuracy
from declip_cli.evaluate.probe_split import ProbeSets, draw_shots
from declip_cli.evaluate.report import FLAT, Predictions, Report
from declip_cli.model.checkpoint import PretrainedModel

FeatureKind: TypeAlias = Literal["pre", "post"]
"""Before or after the projection into the shared embedding."""

L2_GRID = tuple(10.0 ** (-6 + step / 8) for step in range(97))
"""1e-6 to 1e6 in 96 steps, eight a decade. Source: CLIP, appendix A.3."""
_TOP_K = 5
_FIRST_STEP = 16
"""The search starts at 1e-6, 1e-4, … 1e6."""
RAW_SIDE_PX = 16
"""Side of the images of the raw-pixel baseline; 16 px scored higher than 32 px on the demo."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """Features of the readable images of a split."""

    features: Tensor
    """(N, E)."""
    labels: Tensor
    """int64, (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbeReport(Report):
    """Scores of one data set; the fields of `declip linear-probe --json`."""

    dataset: str
    model: str
    features: FeatureKind
    num_train: int
    num_val: int
    num_test: int
    num_classes: int
    feature_dim: int
    drawing: dict[str, int] = field(metadata=FLAT)
    """`shots`, training images per class, and the `seed` that drew them; empty where all are used."""
    l2: float
    """As chosen on the validation images; scikit-learn's 1 / C."""
    val_accuracy: float
    """The set's metric on the validation images, at this penalty, before the refit."""
    metric: Metric
    score: float
    """What papers report for this set: `top1` or `mean_per_class`."""
    top1: float
    mean_per_class: float
    majority_top1: float
    """What always answering the most frequent training class scores."""
    has_converged: bool
    raw_pixels: dict[str, float] | None
    """`side_px`, `l2`, `top1`, `mean_per_class` of the same classifier on the pixels themselves."""
    skipped: Skips
    notes: tuple[str, ...]
    seconds: float
    predictions: Predictions = field(repr=False)
    """Of the test images."""


def linear_probe(
    model: PretrainedModel,
    sets: ProbeSets,
    *,
    features: FeatureKind = "pre",
    shots: int = 0,
    seed: int = 0,
    with_baseline: bool | None = None,
    options: FeatureOptions = DEFAULTS,
) -> LinearProbeReport:
    """Train a linear classifier on frozen features and test it once.

    The penalty is chosen on the validation images; the classifier is then refitted on training and validation
    images together (with `shots`: on the shots alone).

    Args:
        model: a trained model; of token-wise ones (FILIP) the patches are averaged.
        sets: training, validation and test images; without validation images a fifth of each class's training
            images is held out.
        features: before the projection, as CLIP did, or after it.
        shots: training images per class; 0 takes all. The validation images are the same for every number.
        seed: draws the held-out images and the shots.
        with_baseline: also score raw pixels; None does so where the set asks for it.
        options: how features are computed.

    Raises:
        EvaluateError: unreadable images, fewer than two classes, or fewer images than shots.

    Source: CLIP, arXiv 2103.00020, appendix A.3: no normalization, no augmentation.
    """
    started = time.perf_counter()
    drawn, uses_all = draw_shots(sets, shots=shots, seed=seed), not shots
    found = _probe(model, drawn, _encoder(model, features), f"probe {features}", uses_all, options)
    baseline = None
    if sets.raw_pixels if with_baseline is None else with_baseline:
        view = replace(model.preprocessing, image_side_px=RAW_SIDE_PX, resize_px=RAW_SIDE_PX)
        small = replace(model, preprocessing=view)
        raw = _probe(small, drawn, _flat_pixels, f"raw pixels {RAW_SIDE_PX}", uses_all, options)
        baseline = {"side_px": RAW_SIDE_PX, "l2": raw.fit.l2, "top1": raw.top1, "mean_per_class": raw.mean_per_class}
    drawing = {"shots": shots, "seed": seed} if shots else {}
    return _report(model.name, sets, features, found, drawing, baseline, started)


def _report(
    model: str,
    sets: ProbeSets,
    features: FeatureKind,
    found: "_Found",
    drawing: dict[str, int],
    baseline: dict[str, float] | None,
    started: float,
) -> LinearProbeReport:
    notes = [part.note for part in (sets.train, sets.test) if part.note]
    if sets.val is None:
        notes.append("no validation split: a fifth of the training images of each class was held out")
    return LinearProbeReport(
        dataset=sets.name,
        model=model,
        features=features,
        num_train=len(found.train.labels),
        num_val=found.num_val,
        num_test=len(found.test.labels),
        num_classes=len(sets.class_names),
        feature_dim=found.train.features.shape[1],
        drawing=drawing,
        l2=found.fit.l2,
        val_accuracy=found.val_accuracy,
        metric=sets.metric,
        score=found.mean_per_class if sets.metric == "mean_per_class" else found.top1,
        top1=found.top1,
        mean_per_class=found.mean_per_class,
        majority_top1=float((found.test.labels == found.train.labels.bincount().argmax()).double().mean()),
        has_converged=found.fit.has_converged,
        raw_pixels=baseline,
        skipped=found.skipped,
        notes=tuple(dict.fromkeys(notes)),
        seconds=time.perf_counter() - started,
        predictions=found.predictions,
    )


def search_l2(problem: LogisticProblem, val: Labeled, metric: Metric) -> tuple[LogisticFit, float]:
    """Find the penalty that is best on validation images, from coarse to fine.

    Starts with seven values from 1e-6 to 1e6 and halves the step around the best until it is an eighth of a
    decade: 15 of 97 values are tried. Of equal scores the lower cross-entropy wins.

    Returns:
        The fit at the best penalty, and its score by the metric on the validation samples.

    Source: CLIP, arXiv 2103.00020, appendix A.3.
    """
    tried: dict[int, tuple[tuple[float, float], LogisticFit]] = {}

    def key(index: int) -> tuple[float, float]:
        if index not in tried:
            near = min(tried, key=lambda other: abs(other - index), default=None)
            start = tried[near][1] if near is not None else None
            fit = problem.fit(L2_GRID[index], start=start, is_final=False)
            tried[index] = (_validate(fit, val, metric, problem.num_classes), fit)
        return tried[index][0]

    step = _FIRST_STEP
    best = max(reversed(range(0, len(L2_GRID), step)), key=key)
    while step > 1:
        step //= 2
        best = max((index for index in (best, best - step, best + step) if 0 <= index < len(L2_GRID)), key=key)
    (score, _), fit = tried[best]
    return fit, score


def _validate(fit: LogisticFit, val: Labeled, metric: Metric, num_classes: int) -> tuple[float, float]:
    logits = fit.logits(val.features)  # (N, C)
    top1, mean_per_class = _scores(logits, val.labels, num_classes)
    loss = float(F.cross_entropy(logits, val.labels))
    return (mean_per_class if metric == "mean_per_class" else top1), -loss


def _scores(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[float, float]:
    predicted = logits.argmax(dim=1)  # (N,)
    return top_k_accuracy(predicted[:, None], labels, 1), mean_per_class_accuracy(predicted, labels, num_classes)


@dataclass(frozen=True, slots=True)
class _Found:
    train: Labeled
    test: Labeled
    num_val: int
    fit: LogisticFit
    val_accuracy: float
    top1: float
    mean_per_class: float
    predictions: Predictions
    skipped: Skips


def _probe(
    model: PretrainedModel, sets: ProbeSets, encode: Encode, label: str, uses_all: bool, options: FeatureOptions
) -> _Found:
    """Encode the images, choose the penalty, fit again (with `uses_all` on the validation images, too), test once."""
    skipped, parts = Skips(), []
    for part in (sets.train, sets.val, sets.test):
        assert part is not None
        images = map_images(model, part, encode, label=label, options=options)
        skipped.add_all(images.skipped)
        labels = torch.tensor([part.labels[index] for index in images.kept], device=model.device)  # (N,)
        parts.append(Labeled(images.features.to(model.device), labels))
        kept = images.kept  # in the end, of the test images
    train, val, test = parts
    num_classes = len(sets.class_names)
    chosen, val_accuracy = search_l2(LogisticProblem(train.features, train.labels, num_classes), val, sets.metric)
    final = [train, val] if uses_all else [train]
    features, labels = torch.cat([part.features for part in final]), torch.cat([part.labels for part in final])
    fit = LogisticProblem(features, labels, num_classes).fit(chosen.l2, start=chosen)
    logits = fit.logits(test.features)  # (N, C)
    top1, mean_per_class = _scores(logits, test.labels, num_classes)
    predictions = _predictions(sets, kept, logits.cpu().float(), test.labels.cpu())
    return _Found(train, test, len(val.labels), fit, val_accuracy, top1, mean_per_class, predictions, skipped)


def _predictions(sets: ProbeSets, kept: Sequence[int], logits: Tensor, labels: Tensor) -> Predictions:
    best = logits.topk(min(_TOP_K, logits.shape[1]))  # (N, K)
    return Predictions(
        keys=[sets.test.named(index) for index in kept],
        labels=labels,
        ranked=best.indices,
        scores=best.values,
        confidence=logits.softmax(dim=1).amax(dim=1),  # (N,)
        class_names=sets.class_names,
        read=lambda row: sets.test.read(kept[row]).image,
    )


def _encoder(model: PretrainedModel, kind: FeatureKind) -> Encode:
    """Choose what is taken from the tower: uint8 images (B, S, S, 3) → (B, E)."""

    def encode(images: Tensor) -> Tensor:
        if not model.token_wise:
            return model.encoder.encode_image(images, projected=kind == "post")  # (B, E)
        encoder = model.towers
        patches = encoder.image_states(images).patches if kind == "pre" else encoder.encode_image_tokens(images)
        return patches.float().mean(dim=1)  # (B, E)

    return encode


def _flat_pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255  # (B, 3 S S)
