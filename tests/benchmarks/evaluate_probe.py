"""Logistic regression against scikit-learn's, one penalty and CLIP's search over penalties."""

import importlib.metadata
import time

import numpy as np
import torch
from lines import report, seconds_of
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from declip_cli.evaluate.linear_probe import Labeled, search_l2
from declip_cli.evaluate.logistic import LogisticProblem

C = 0.316
"""The value of CLIP's README for CIFAR-100."""


def make_features(num: int, dim: int, num_classes: int, *, separation: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw training and validation features like those of a tower: steep spectrum, offset, mean length 10."""
    random = np.random.default_rng(0)
    spread = np.arange(1, dim + 1) ** -0.5
    turn, _ = np.linalg.qr(random.standard_normal((dim, dim)))
    centers = random.standard_normal((num_classes, dim)) * spread * separation
    offset = random.standard_normal(dim) * 0.5
    parts = []
    for count in (num, num // 5):
        labels = random.integers(0, num_classes, count)
        features = (centers[labels] + random.standard_normal((count, dim)) * spread + offset) @ turn
        parts.append((features.astype(np.float32), labels))
    scale = np.float32(10 / np.linalg.norm(parts[0][0], axis=1).mean())
    return [(features * scale, labels) for features, labels in parts]


def objective(features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, l2: float) -> float:
    """Compute the mean cross-entropy and the penalty per sample, in float64."""
    logits = torch.from_numpy(features.astype(np.float64) @ weight.T.astype(np.float64) + bias)
    loss = float(F.cross_entropy(logits, torch.from_numpy(labels)))
    return loss + l2 / (2 * len(labels)) * float((weight.astype(np.float64) ** 2).sum())


def probe(*, runs: int, num: int, dim: int, num_classes: int) -> None:
    """Time one fit, preparation included, in CPU seconds; compare the objectives; time the search of 15 penalties."""
    peer_name = f"scikit-learn {importlib.metadata.version('scikit-learn')} LogisticRegression(max_iter=1000)"
    separation = 0.12 if num_classes <= 10 else 0.16
    (features, labels), (val_features, val_labels) = make_features(num, dim, num_classes, separation=separation)
    tensors = torch.from_numpy(features), torch.from_numpy(labels)
    name = f"logistic regression {num}x{dim}, {num_classes} classes"
    peer = LogisticRegression(C=C, max_iter=1000)
    theirs = seconds_of(lambda: peer.fit(features, labels), time.process_time)
    seconds = sorted(
        seconds_of(lambda: LogisticProblem(*tensors, num_classes).fit(1 / C), time.process_time) for _ in range(runs)
    )
    ours = seconds[len(seconds) // 2]
    report(name, ours, theirs, peer_name=peer_name, unit="s", runs=runs, ratio=theirs / ours)
    fit = LogisticProblem(*tensors, num_classes).fit(1 / C)
    values = (
        objective(features, labels, fit.weight.numpy(), fit.bias.numpy(), 1 / C),
        objective(features, labels, peer.coef_, peer.intercept_, 1 / C),
    )
    report(f"{name}, objective", *values, peer_name=peer_name, unit="nats", runs=1, ratio=values[1] / values[0])
    val = Labeled(torch.from_numpy(val_features), torch.from_numpy(val_labels))
    sweep = seconds_of(lambda: search_l2(LogisticProblem(*tensors, num_classes), val, "accuracy"), time.process_time)
    report(
        f"{name}, search of 15 penalties against 15 times one fit",
        sweep,
        15 * theirs,
        peer_name=peer_name,
        unit="s",
        runs=1,
        ratio=15 * theirs / sweep,
    )
