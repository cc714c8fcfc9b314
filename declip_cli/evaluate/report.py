"""What lies behind a score: predictions picture by picture, accuracy per class, confused pairs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from declip_cli.errors import EvaluateError
from declip_cli.evaluate.metrics import per_class_accuracy
from declip_cli.evaluate.zeroshot import Predictions
from declip_cli.files import write_text

NUM_CONFUSED = 20
"""Confused pairs in a report."""


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
    lines = [
        json.dumps(({"dataset": name} if len(parts) > 1 else {}) | line, ensure_ascii=False) + "\n"
        for name, predictions in parts.items()
        for line in _lines(predictions)
    ]
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        raise EvaluateError(
            f"cannot write the predictions to {path}: {error.strerror}",
            remedy="name a file in a folder that exists and can be written, with --predictions FILE",
        ) from error
    return len(lines)


def _lines(predictions: Predictions) -> list[dict[str, Any]]:
    names = predictions.class_names
    rows = zip(
        predictions.keys,
        predictions.labels.tolist(),
        predictions.ranked.tolist(),
        predictions.scores.tolist(),
        strict=True,
    )
    return [
        {
            "path": key,
            "label": names[label],
            "is_right": ranked[0] == label,
            "top5": [names[number] for number in ranked],
            "scores": [round(score, 6) for score in scores],
        }
        for key, label, ranked, scores in rows
    ]


def class_report(predictions: Predictions) -> dict[str, Any]:
    """Say which classes are recognised and which are taken for others.

    Args:
        predictions: of one data set.

    Returns:
        `per_class`: name, number of pictures and accuracy, worst first; `confused`: the most frequent pairs of
        right and predicted class, with how often and what share of the right class's pictures.
    """
    names = predictions.class_names
    predicted = predictions.ranked[:, 0]  # (N',)
    accuracy, counts = per_class_accuracy(predicted, predictions.labels, len(names))
    per_class = [
        {"class": names[number], "num_images": int(counts[number]), "accuracy": float(accuracy[number])}
        for number in range(len(names))
        if counts[number] > 0
    ]
    per_class.sort(key=lambda entry: (entry["accuracy"], -int(str(entry["num_images"]))))
    pairs = Counter(
        pair for pair in zip(predictions.labels.tolist(), predicted.tolist(), strict=True) if pair[0] != pair[1]
    )
    confused = [
        {
            "class": names[right],
            "predicted": names[wrong],
            "count": count,
            "share": count / int(counts[right]),
        }
        for (right, wrong), count in pairs.most_common(NUM_CONFUSED)
    ]
    return {"per_class": per_class, "confused": confused}
