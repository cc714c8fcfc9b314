"""Scores of classification."""

import pytest
import torch

from declip_cli.evaluate.metrics import (
    chance_accuracy,
    mean_per_class_accuracy,
    per_class_accuracy,
    top_k_accuracy,
)

RANKED = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]])
LABELS = torch.tensor([2, 1, 0, 0])


@pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 0.75), (3, 1.0)])
def test_top_k_accuracy_counts_the_right_class_among_the_first_k(k: int, expected: float):
    assert top_k_accuracy(RANKED, LABELS, k) == expected


def test_mean_per_class_weighs_classes_not_pictures():
    predicted = torch.tensor([0] * 9 + [1] + [0] * 2)
    labels = torch.tensor([0] * 10 + [1] * 2)
    assert top_k_accuracy(predicted[:, None], labels, 1) == pytest.approx(9 / 12)
    assert mean_per_class_accuracy(predicted, labels, 2) == pytest.approx((0.9 + 0.0) / 2)


def test_mean_per_class_equals_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(0, 7, (2, 300), generator=generator)
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert mean_per_class_accuracy(predicted, labels, 7) == pytest.approx(expected, abs=1e-12)


def test_classes_without_pictures_are_left_out_of_the_mean():
    accuracy, counts = per_class_accuracy(torch.tensor([0, 0]), torch.tensor([0, 0]), 3)
    assert counts.tolist() == [2, 0, 0]
    assert accuracy[0] == 1
    assert accuracy[1:].isnan().all()
    assert mean_per_class_accuracy(torch.tensor([0, 0]), torch.tensor([0, 0]), 3) == 1


def test_chance_is_k_in_c():
    assert chance_accuracy(1217, 5) == pytest.approx(5 / 1217)
    assert chance_accuracy(4, 5) == 1
