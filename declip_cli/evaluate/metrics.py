"""Scores as pure functions of predictions."""

import torch
from torch import Tensor


def top_k_accuracy(ranked: Tensor, labels: Tensor, k: int) -> float:
    """Count how often the right class is among the first k.

    Args:
        ranked: classes of each sample, best first, int64, (N, K) with K >= k.
        labels: the right class, int64, (N,).
        k: how many count.

    Returns:
        A fraction in [0, 1].
    """
    hits = (ranked[:, :k] == labels[:, None]).any(dim=1)  # (N,)
    return int(hits.sum()) / len(labels)


def per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Take the accuracy within each of C classes, of predicted and right classes, both int64, (N,).

    Returns:
        Accuracy, float64, (C,), not a number for a class without samples; and samples per class, int64, (C,).
    """
    counts = torch.bincount(labels, minlength=num_classes)  # (C,)
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)  # (C,)
    return hits.double() / counts, counts


def mean_per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Average the accuracies of C classes, each counting the same; arguments as of `per_class_accuracy`.

    Returns:
        A fraction in [0, 1]; classes without samples are left out.

    Source: CLIP, arXiv 2103.00020, table 9, "mean per class".
    """
    accuracy, counts = per_class_accuracy(predicted, labels, num_classes)
    return float(accuracy[counts > 0].mean())


def chance_accuracy(num_classes: int, k: int = 1) -> float:
    """Return what guessing k different classes reaches, in accuracy as in mean per class."""
    return min(1.0, k / num_classes)


def recall_at(ranks: Tensor, k: int) -> float:
    """Count how often a right answer is among the first k.

    Args:
        ranks: place of the best right answer of each query, 1 is the best, int64, (N,).
        k: how many count.

    Returns:
        A fraction in [0, 1].
    """
    return int((ranks <= k).sum()) / len(ranks)


def median_rank(ranks: Tensor) -> float:
    """Return the middle rank, or halfway between the two middle ones."""
    ordered = ranks.sort().values
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else float(ordered[middle - 1 : middle + 1].double().mean())
