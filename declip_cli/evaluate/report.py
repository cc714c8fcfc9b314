"""What evaluations find, as JSON: one way for all reports, predictions image by image, accuracy per class."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from declip_cli.data.dataset import Pixels, Skips
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.metrics import per_class_accuracy
from declip_cli.files import write_text

NUM_CONFUSED = 20
"""Confused pairs in a report."""
FLAT = {"flat": True}
"""Metadata of a field whose keys stand beside the other fields."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is found on one data set; the fields of its children are those of `--json`, in their order."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields; those that are None or empty, or hidden (`repr=False`), are omitted."""
        report: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if not one.repr or value is None or value in ((), {}):
                continue
            if one.metadata.get("flat"):
                report |= value
            elif isinstance(value, Skips):
                report |= {"num_skipped": value.num, "skipped": value.to_json()}
            elif isinstance(value, list | tuple):
                report[one.name] = [item.to_json() if isinstance(item, Report) else item for item in value]
            else:
                report[one.name] = value
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The best classes of each scored image."""

    keys: list[str]
    """What names each image, N'."""
    labels: Tensor
    """The right class, int64, (N',)."""
    ranked: Tensor
    """Classes, best first, int64, (N', K)."""
    scores: Tensor
    """Their cosine similarity (token-wise models: token-wise score; linear probe: logit), float32, (N', K)."""
    confidence: Tensor
    """Probability of the best class: softmax over all, of similarities times the logit scale, float32, (N',)."""
    class_names: tuple[str, ...] = field(repr=False)
    read: Callable[[int], bytes | Pixels] = field(repr=False)
    """Reads the image of a row; DataError where it cannot be read any more."""


def write_predictions(path: Path, parts: dict[str, Predictions]) -> int:
    """Write one JSON object a line: path, label, the five best classes and their scores.

    Args:
        path: replaced whole once everything is written.
        parts: data set → its predictions; with several sets each line names its own.

    Returns:
        The number of lines.

    Raises:
        EvaluateError: the file cannot be written.
    """
    lines = []
    for name, found in parts.items():
        names = found.class_names
        rows = zip(found.keys, found.labels.tolist(), found.ranked.tolist(), found.scores.tolist(), strict=True)
        for key, label, ranked, scores in rows:
            line = {
                "path": key,
                "label": names[label],
                "is_right": ranked[0] == label,
                "top5": [names[index] for index in ranked],
                "scores": [round(score, 6) for score in scores],
            }
            lines.append(json.dumps(({"dataset": name} if len(parts) > 1 else {}) | line, ensure_ascii=False) + "\n")
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        raise EvaluateError(
            f"cannot write the predictions to {path}: {error.strerror}",
            remedy="name a file in a folder that exists and can be written, with --predictions FILE",
        ) from error
    return len(lines)


def class_report(predictions: Predictions) -> dict[str, Any]:
    """Report which classes are recognized and which are confused.

    Returns:
        `per_class`: name, number of images and accuracy, worst first; `confused`: the most frequent pairs of
        right and predicted class, with how often and what share of the right class's images.
    """
    names, predicted = predictions.class_names, predictions.ranked[:, 0]  # (N',)
    accuracy, counts = per_class_accuracy(predicted, predictions.labels, len(names))
    there = [index for index in range(len(names)) if counts[index] > 0]
    there.sort(key=lambda index: (float(accuracy[index]), -int(counts[index])))
    pairs = Counter(
        pair for pair in zip(predictions.labels.tolist(), predicted.tolist(), strict=True) if pair[0] != pair[1]
    )
    return {
        "per_class": [
            {"class": names[index], "num_images": int(counts[index]), "accuracy": float(accuracy[index])}
            for index in there
        ],
        "confused": [
            {"class": names[right], "predicted": names[wrong], "count": count, "share": count / int(counts[right])}
            for (right, wrong), count in pairs.most_common(NUM_CONFUSED)
        ],
    }
