"""Labels for images without any: the likeliest of some classes for each image."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from declip_cli.data.benchmarks.known import read_lines
from declip_cli.data.dataset import Dataset, Skips
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.prompts import make_prompts
from declip_cli.evaluate.report import Report
from declip_cli.evaluate.zeroshot import DEFAULT_TEMPLATES, class_scores
from declip_cli.model.checkpoint import PretrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeled(Report):
    """The label of one image."""

    path: str
    label: str
    probability: float
    """Softmax over the labels of the scores times the model's logit scale, as in training; in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelReport(Report):
    """Labels of a collection; the fields of `declip zeroshot --labels --json`."""

    dataset: str
    model: str
    num_images: int
    """Images with a label; unreadable ones are in `skipped`."""
    labels: list[str]
    templates: str
    predictions: list[Labeled]
    skipped: Skips
    seconds: float


def label_images(
    model: PretrainedModel,
    dataset: Dataset,
    labels: Sequence[str],
    *,
    templates: str = "",
    options: FeatureOptions = DEFAULTS,
) -> LabelReport:
    """Choose the likeliest label for each image, in the order of the data set.

    The probabilities tell the labels from each other. They are not calibrated, and none of them says that an image
    shows something else.

    Args:
        model: a trained model.
        dataset: images; their own classes, if any, do not count.
        labels: at least two, each once.
        templates: as in `make_prompts`; empty takes OpenAI's 80.
        options: how features are computed.

    Raises:
        EvaluateError: unusable labels, prompts or images.
    """
    started, templates = time.perf_counter(), templates or DEFAULT_TEMPLATES
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise EvaluateError(
            f"--labels needs two labels or more, each once (got {', '.join(labels) or 'none'})",
            remedy="--labels cat,dog, or --labels FILE with one a line",
        )
    chunks, images = class_scores(model, dataset, make_prompts(labels, templates), options)
    scale = model.encoder.logit_scale.detach().float().exp().cpu()  # ()
    best = [(scale * chunk.cpu()).softmax(dim=1).max(dim=1) for chunk in chunks]  # (n, C) -> (n,)
    probabilities = torch.cat([b.values for b in best]).tolist()
    chosen = torch.cat([b.indices for b in best]).tolist()
    skipped = Skips(dataset.skipped)
    skipped.add_all(images.skipped)
    return LabelReport(
        dataset=dataset.name,
        model=model.name,
        num_images=len(chosen),
        labels=list(labels),
        templates=templates,
        predictions=[
            Labeled(path=dataset.named(index), label=labels[label], probability=probability)
            for index, label, probability in zip(images.kept, chosen, probabilities, strict=True)
        ],
        skipped=skipped,
        seconds=time.perf_counter() - started,
    )


def read_labels(words: str) -> list[str]:
    """Read `--labels`: labels apart by commas, or the path of a file with one a line.

    Raises:
        DataError: the file is not text.
    """
    try:
        is_path = Path(words).is_file()
    except (OSError, ValueError):  # too long for a path
        is_path = False
    return read_lines(Path(words)) if is_path else [word.strip() for word in words.split(",") if word.strip()]
