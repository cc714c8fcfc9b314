"""Linear probe: a linear classifier on frozen features, as in CLIP's appendix A.3."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.dataset import Dataset, Metric, Skips
from declip_cli.data.files_dataset import Subset
from declip_cli.evaluate.features import FeatureOptions, ImageFeatures, map_images
from declip_cli.evaluate.logistic import LogisticFit, LogisticProblem
from declip_cli.evaluate.metrics import mean_per_class_accuracy, top_k_accuracy
from declip_cli.evaluate.probe_split import ProbeSets, choose_shots, hold_out
from declip_cli.model.checkpoint import PretrainedModel

FeatureKind: TypeAlias = Literal["pre", "post"]
"""Before or after the projection into the shared embedding."""

L2_GRID = tuple(10.0 ** (-6 + step / 8) for step in range(97))
"""1e-6 to 1e6 in 96 steps, eight a decade. Source: CLIP, appendix A.3."""
_FIRST_STEP = 16
"""The search starts at 1e-6, 1e-4, … 1e6."""
RAW_SIDE_PX = 16
"""Side of the pictures of the raw-pixel baseline; 16 px scored higher than 32 px on the demo."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Features of the readable pictures of a split."""

    features: Tensor
    """(N, E)."""
    labels: Tensor
    """int64, (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The same classifier on the pixels themselves."""

    side_px: int
    l2: float
    top1: float
    mean_per_class: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbeReport:
    """Scores of one data set."""

    dataset: str
    model: str
    features: FeatureKind
    num_train: int
    num_val: int
    num_test: int
    num_classes: int
    feature_dim: int
    shots: int
    """Training pictures per class; 0 is all."""
    seed: int
    l2: float
    """As chosen on the validation pictures; scikit-learn's 1 / C."""
    val_accuracy: float
    """The set's metric on the validation pictures, at this penalty, before the refit."""
    metric: Metric
    top1: float
    mean_per_class: float
    majority_top1: float
    """What always answering the most frequent training class scores."""
    has_converged: bool
    baseline: Baseline | None
    skipped: dict[str, dict[str, int | str]]
    notes: tuple[str, ...]
    seconds: float

    @property
    def score(self) -> float:
        """What papers report for this set: `top1` or `mean_per_class`."""
        return self.mean_per_class if self.metric == "mean_per_class" else self.top1

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `declip linear-probe --json`."""
        report: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "features": self.features,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "num_classes": self.num_classes,
            "feature_dim": self.feature_dim,
        }
        if self.shots:
            report |= {"shots": self.shots, "seed": self.seed}
        report |= {
            "l2": self.l2,
            "val_accuracy": self.val_accuracy,
            "metric": self.metric,
            "score": self.score,
            "top1": self.top1,
            "mean_per_class": self.mean_per_class,
            "majority_top1": self.majority_top1,
            "has_converged": self.has_converged,
        }
        if self.baseline is not None:
            pixels = self.baseline
            report["raw_pixels"] = {
                "side_px": pixels.side_px,
                "l2": pixels.l2,
                "top1": pixels.top1,
                "mean_per_class": pixels.mean_per_class,
            }
        if self.skipped:
            report["num_skipped"] = sum(int(entry["count"]) for entry in self.skipped.values())
            report["skipped"] = self.skipped
        if self.notes:
            report["notes"] = list(self.notes)
        report["seconds"] = self.seconds
        return report


def linear_probe(
    model: PretrainedModel,
    sets: ProbeSets,
    *,
    features: FeatureKind = "pre",
    shots: int = 0,
    seed: int = 0,
    with_baseline: bool | None = None,
    options: FeatureOptions | None = None,
) -> LinearProbeReport:
    """Train a linear classifier on frozen features and test it once.

    The penalty is chosen on the validation pictures; the classifier is then fitted anew on training and
    validation pictures together (with `shots`: on the shots alone).

    Args:
        model: a trained model; of token-wise ones (FILIP) the patches are averaged.
        sets: training, validation and test pictures; without validation pictures a fifth of each class's
            training pictures is held out.
        features: before the projection, as CLIP did, or after it.
        shots: training pictures per class; 0 takes all. The validation pictures are the same for every number.
        seed: draws the held-out pictures and the shots.
        with_baseline: also score raw pixels; None does so where the set asks for it.
        options: batch size, precision, threads, cache.

    Returns:
        Accuracies on the test pictures.

    Raises:
        EvaluateError: unreadable pictures, fewer than two classes, or fewer pictures than shots.

    Source: CLIP, arXiv 2103.00020, appendix A.3: no normalisation, no augmentation.
    """
    started = time.perf_counter()
    options = options or FeatureOptions()
    job = _Job(model, sets, shots=shots, seed=seed)
    found = job.run(model, _encoder(model, features), f"probe {features}", options)
    is_wanted = sets.raw_pixels if with_baseline is None else with_baseline
    baseline = _raw_pixels(job, options) if is_wanted else None
    return _report(job, found, features=features, baseline=baseline, started=started)


def _report(
    job: "_Job", found: "_Found", *, features: FeatureKind, baseline: Baseline | None, started: float
) -> LinearProbeReport:
    return LinearProbeReport(
        dataset=job.sets.name,
        model=job.model.name,
        features=features,
        num_train=len(found.train.labels),
        num_val=len(found.val.labels),
        num_test=len(found.test.labels),
        num_classes=len(job.sets.class_names),
        feature_dim=found.train.features.shape[1],
        shots=job.shots,
        seed=job.seed,
        l2=found.fit.l2,
        val_accuracy=found.val_score,
        metric=job.sets.metric,
        top1=found.top1,
        mean_per_class=found.mean_per_class,
        majority_top1=_majority(found.train.labels, found.test.labels),
        has_converged=found.fit.has_converged,
        baseline=baseline,
        skipped=job.skipped.to_json(),
        notes=job.notes(),
        seconds=time.perf_counter() - started,
    )


def search_l2(problem: LogisticProblem, val: Labelled, metric: Metric) -> tuple[LogisticFit, float]:
    """Find the penalty that is best on validation pictures, from coarse to fine.

    Starts with seven values from 1e-6 to 1e6 and halves the step around the best until it is an eighth of a
    decade: 15 of 97 values are tried. Of equal scores the lower cross-entropy wins.

    Args:
        problem: the training samples.
        val: the validation samples.
        metric: what is to be best.

    Returns:
        The fit at the best penalty, and its score on the validation samples.

    Source: CLIP, arXiv 2103.00020, appendix A.3.
    """
    tried: dict[int, tuple[tuple[float, float], LogisticFit]] = {}

    def key(place: int) -> tuple[float, float]:
        if place not in tried:
            near = min(tried, key=lambda other: abs(other - place), default=None)
            start = tried[near][1] if near is not None else None
            fit = problem.fit(L2_GRID[place], start=start, is_final=False)
            tried[place] = (_validate(fit, val, metric, problem.num_classes), fit)
        return tried[place][0]

    step = _FIRST_STEP
    best = max(reversed(range(0, len(L2_GRID), step)), key=key)
    while step > 1:
        step //= 2
        best = max((place for place in (best, best - step, best + step) if 0 <= place < len(L2_GRID)), key=key)
    (score, _), fit = tried[best]
    return fit, score


def _validate(fit: LogisticFit, val: Labelled, metric: Metric, num_classes: int) -> tuple[float, float]:
    logits = fit.logits(val.features)  # (N, C)
    top1, mean_per_class = _scores(logits, val.labels, num_classes)
    loss = float(F.cross_entropy(logits, val.labels))
    return (mean_per_class if metric == "mean_per_class" else top1), -loss


def _scores(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[float, float]:
    predicted = logits.argmax(dim=1)  # (N,)
    return top_k_accuracy(predicted[:, None], labels, 1), mean_per_class_accuracy(predicted, labels, num_classes)


def _majority(train: Tensor, test: Tensor) -> float:
    return float((test == train.bincount().argmax()).double().mean())


@dataclass(frozen=True, slots=True)
class _Found:
    train: Labelled
    val: Labelled
    test: Labelled
    fit: LogisticFit
    val_score: float
    top1: float
    mean_per_class: float


class _Job:
    """Which pictures train, validate and test; the same for features and for raw pixels."""

    def __init__(self, model: PretrainedModel, sets: ProbeSets, *, shots: int, seed: int) -> None:
        self.model, self.sets, self.shots, self.seed = model, sets, shots, seed
        self.skipped = Skips()
        numbers = list(range(len(sets.train)))
        self.is_held_out = sets.val is None
        if self.is_held_out:
            numbers, held = hold_out(sets.train.labels, seed=seed)
            self.val: Dataset = Subset(sets.train, held)
        else:
            assert sets.val is not None
            self.val = sets.val
        if shots:
            numbers = choose_shots(sets.train.labels, numbers, shots=shots, seed=seed, names=sets.class_names)
        self.train = Subset(sets.train, numbers)

    def run(
        self, model: PretrainedModel, encode: Callable[[Tensor], Tensor], label: str, options: FeatureOptions
    ) -> _Found:
        """Encode the pictures, choose the penalty, fit again, test once."""
        self.skipped = Skips()
        parts = (self.train, self.val, self.sets.test)
        train, val, test = (
            self._labelled(part, map_images(model, part, encode, label=label, options=options)) for part in parts
        )
        num_classes, metric = len(self.sets.class_names), self.sets.metric
        chosen, val_score = search_l2(LogisticProblem(train.features, train.labels, num_classes), val, metric)
        final = train if self.shots else _joined(train, val)
        problem = LogisticProblem(final.features, final.labels, num_classes)
        fit = problem.fit(chosen.l2, start=chosen)
        top1, mean_per_class = _scores(fit.logits(test.features), test.labels, num_classes)
        return _Found(train, val, test, fit, val_score, top1, mean_per_class)

    def _labelled(self, part: Dataset, images: ImageFeatures) -> Labelled:
        self.skipped.add_all(images.skipped)
        device = next(self.model.encoder.parameters()).device
        labels = torch.tensor([part.labels[number] for number in images.kept], device=device)  # (N,)
        return Labelled(images.features.to(device), labels)

    def notes(self) -> tuple[str, ...]:
        said = [part.note for part in (self.sets.train, self.sets.test) if part.note]
        if self.is_held_out:
            said.append("no validation split: a fifth of the training pictures of each class was held out")
        return tuple(dict.fromkeys(said))


def _joined(first: Labelled, second: Labelled) -> Labelled:
    return Labelled(torch.cat([first.features, second.features]), torch.cat([first.labels, second.labels]))


def _encoder(model: PretrainedModel, kind: FeatureKind) -> Callable[[Tensor], Tensor]:
    """Choose what is read off the tower: uint8 pictures (B, S, S, 3) → (B, E)."""
    encoder = model.encoder

    def encode(images: Tensor) -> Tensor:
        if not model.token_wise:
            return encoder.encode_image(images, projected=kind == "post")  # (B, E)
        patches = encoder.image_states(images).patches if kind == "pre" else encoder.encode_image_tokens(images)
        return patches.float().mean(dim=1)  # (B, E)

    return encode


def _raw_pixels(job: _Job, options: FeatureOptions) -> Baseline:
    view = replace(job.model.preprocessing, image_side_px=RAW_SIDE_PX, resize_px=RAW_SIDE_PX)
    small = replace(job.model, preprocessing=view)
    found = job.run(small, lambda images: images.flatten(1).float() / 255, f"raw pixels {RAW_SIDE_PX}", options)
    return Baseline(side_px=RAW_SIDE_PX, l2=found.fit.l2, top1=found.top1, mean_per_class=found.mean_per_class)
