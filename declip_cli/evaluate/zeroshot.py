"""Zero-shot classification: images against the prompts of classes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from declip_cli.data.catalog import classified
from declip_cli.data.dataset import Classes, Dataset, Metric, Skips
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import ImageFeatures, content_key, image_features, map_images
from declip_cli.evaluate.metrics import chance_accuracy, mean_per_class_accuracy, top_k_accuracy
from declip_cli.evaluate.prompts import Prompts, build_classifier, make_prompts
from declip_cli.evaluate.report import Predictions, Report
from declip_cli.evaluate.texts import count_truncated
from declip_cli.evaluate.token_wise import build_token_classifier
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import resolve_precision

DEFAULT_TEMPLATES = "80"
"""For sets without templates of their own."""
_TOP_K = 5
_CHUNK_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotReport(Report):
    """Scores of one data set; the fields of `declip zeroshot --json`."""

    dataset: str
    split: str
    model: str
    num_images: int
    """Images that were scored; unreadable ones are in `skipped`."""
    num_classes: int
    num_templates: int
    templates: str
    """Which prompts: an ensemble or a file as the user named it, or `own` for the set's."""
    precision: str
    """Number format of the forward passes: fp32 or bf16."""
    metric: Metric
    score: float
    """What papers report for this set: `top1` or `mean_per_class`."""
    top1: float
    top5: float | None
    """None below five classes."""
    mean_per_class: float
    chance_top1: float
    chance_top5: float | None
    num_truncated_prompts: int | None
    """Prompts longer than the model reads; their ends were left out. None if there is none."""
    skipped: Skips
    note: str | None
    seconds: float
    predictions: Predictions = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """See `Report.to_json`; the number of truncated prompts also has its name of version 0.1, until the next."""
        report = Report.to_json(self)
        num = self.num_truncated_prompts
        return report if num is None else report | {"num_prompts_cut": num}


def zeroshot(
    model: PretrainedModel,
    dataset: Dataset,
    *,
    templates: str | Sequence[str] = "",
    options: FeatureOptions = DEFAULTS,
) -> ZeroshotReport:
    """Classify the images of a data set by the prompts of its classes.

    Args:
        model: a trained model; token-wise ones (FILIP) are compared token by token.
        dataset: images with labels.
        templates: as in `make_prompts`; empty takes the set's own, else OpenAI's 80.
        options: how features are computed.

    Raises:
        EvaluateError: unusable prompts or images.

    Source: CLIP, arXiv 2103.00020, section 3.1.
    """
    started, dataset = time.perf_counter(), classified(dataset)
    classes = dataset.classes or Classes(names=())
    chosen = templates or classes.templates or DEFAULT_TEMPLATES
    prompts = make_prompts(classes.names, chosen)
    predictions, skipped = _predict(model, dataset, classes.names, prompts, options)
    ranked, labels, num_classes = predictions.ranked, predictions.labels, len(classes.names)
    top1 = top_k_accuracy(ranked, labels, 1)
    mean_per_class = mean_per_class_accuracy(ranked[:, 0], labels, num_classes)
    return ZeroshotReport(
        dataset=dataset.name,
        split=dataset.split,
        model=model.name,
        num_images=len(labels),
        num_classes=num_classes,
        num_templates=prompts.num_templates,
        templates=chosen if isinstance(chosen, str) else "own",
        precision=resolve_precision(options.precision, model.device),
        metric=classes.metric,
        score=mean_per_class if classes.metric == "mean_per_class" else top1,
        top1=top1,
        top5=top_k_accuracy(ranked, labels, _TOP_K) if has_top5(num_classes) else None,
        mean_per_class=mean_per_class,
        chance_top1=chance_accuracy(num_classes),
        chance_top5=chance_accuracy(num_classes, _TOP_K) if has_top5(num_classes) else None,
        num_truncated_prompts=count_truncated(prompts.flat(), model.context_length, model.tokenizer) or None,
        skipped=skipped,
        note=dataset.note or None,
        seconds=time.perf_counter() - started,
        predictions=predictions,
    )


def has_top5(num_classes: int) -> bool:
    """Return whether there are enough classes for `top5`."""
    return num_classes >= _TOP_K


def _predict(
    model: PretrainedModel, dataset: Dataset, names: tuple[str, ...], prompts: Prompts, options: FeatureOptions
) -> tuple[Predictions, Skips]:
    if len(names) < 2:
        raise EvaluateError(
            f"{dataset.name} has only the class {names[0]!r}, there is nothing to distinguish",
            remedy="add a second class",
        )
    chunks, images = class_scores(model, dataset, prompts, options)
    scale = model.encoder.logit_scale.detach().float().exp().cpu()  # ()
    best, confidence = [], []
    for chunk in chunks:  # (n, C)
        best.append(chunk.topk(min(_TOP_K, len(names))))  # (n, K)
        confidence.append((scale * chunk.cpu().float()).softmax(dim=1).amax(dim=1))  # (n,)
    predictions = Predictions(
        keys=[dataset.named(index) for index in images.kept],
        labels=torch.tensor([dataset.labels[index] for index in images.kept]),  # (N',)
        ranked=torch.cat([b.indices for b in best]),
        scores=torch.cat([b.values for b in best]),
        confidence=torch.cat(confidence),
        class_names=names,
        read=lambda row: dataset.read(images.kept[row]).image,
    )
    return predictions, images.skipped


def class_scores(
    model: PretrainedModel, dataset: Dataset, prompts: Prompts, options: FeatureOptions
) -> tuple[Iterator[Tensor], ImageFeatures]:
    """Score images by the prompts of C classes.

    Returns:
        The cosine of each image with each class (token-wise models: their token-wise score), some images at once,
        (n, C), without one large score matrix; and which images could be read.

    Raises:
        EvaluateError: no image can be read.
    """
    if model.token_wise:
        token_classes = build_token_classifier(model, prompts, options=options).to(model.device)

        def encode(pixels: Tensor) -> Tensor:  # (B, S, S, 3) -> (B, C)
            return token_classes.score(model.towers.encode_image_tokens(pixels))

        label = content_key(["token-wise scores", *map(content_key, prompts.by_class)])
        images = map_images(model, dataset, encode, label=label, options=options)
        return iter(images.features.split(_CHUNK_SIZE)), images
    classes = build_classifier(model, prompts, options=options)  # (C, D)
    images = image_features(model, dataset, options=options)
    return (chunk @ classes.T for chunk in images.features.split(_CHUNK_SIZE)), images
