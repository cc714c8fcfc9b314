"""Scores of classification; ranks equal a plain stable sort, recalls equal CLIP_benchmark's, ties do not flatter."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from sklearn.metrics import balanced_accuracy_score
from torch.nn import functional as F

from declip_cli.evaluate import metrics
from declip_cli.evaluate.metrics import (
    chance_accuracy,
    mean_per_class_accuracy,
    median_rank,
    paired_ranks,
    per_class_accuracy,
    ranks_in_rows,
    recall_at,
    top_k_accuracy,
)

RANKED = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]])
LABELS = torch.tensor([2, 1, 0, 0])


@pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 0.75), (3, 1.0)])
def test_top_k_accuracy_counts_the_right_class_among_the_first_k(k: int, expected: float):
    assert top_k_accuracy(RANKED, LABELS, k) == expected


def test_mean_per_class_weighs_classes_not_images():
    predicted = torch.tensor([0] * 9 + [1] + [0] * 2)
    labels = torch.tensor([0] * 10 + [1] * 2)
    assert top_k_accuracy(predicted[:, None], labels, 1) == pytest.approx(9 / 12)
    assert mean_per_class_accuracy(predicted, labels, 2) == pytest.approx((0.9 + 0.0) / 2)


def test_mean_per_class_equals_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(0, 7, (2, 300), generator=generator)
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert mean_per_class_accuracy(predicted, labels, 7) == pytest.approx(expected, abs=1e-12)


def test_classes_without_images_are_left_out_of_the_mean():
    accuracy, counts = per_class_accuracy(torch.tensor([0, 0]), torch.tensor([0, 0]), 3)
    assert counts.tolist() == [2, 0, 0]
    assert accuracy[0] == 1
    assert accuracy[1:].isnan().all()
    assert mean_per_class_accuracy(torch.tensor([0, 0]), torch.tensor([0, 0]), 3) == 1


def test_chance_is_k_in_c():
    assert chance_accuracy(1217, 5) == pytest.approx(5 / 1217)
    assert chance_accuracy(4, 5) == 1


def make_pairs(num_images: int, captions: list[int], dim: int, *, noise: float = 0.5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(num_images, dim, generator=generator), dim=1)
    image_ids = torch.repeat_interleave(torch.arange(num_images), torch.tensor(captions))
    texts = F.normalize(images[image_ids] + noise * torch.randn(len(image_ids), dim, generator=generator), dim=1)
    return images, texts, image_ids


def plain_ranks(images, texts, image_ids):
    """Sort stably, best first, and look where the right answers stand."""
    scores = texts.numpy() @ images.numpy().T
    text_ranks = [
        1 + np.argsort(-row, kind="stable").tolist().index(own)
        for row, own in zip(scores, image_ids.tolist(), strict=True)
    ]
    image_ranks = []
    for number in range(len(images)):
        if number in image_ids:
            order = np.argsort(-scores[:, number], kind="stable")
            image_ranks.append(1 + image_ids.numpy()[order].tolist().index(number))
    return image_ranks, text_ranks


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_a_stable_sort(seed):
    images, texts, image_ids = make_pairs(37, [1 + n % 4 for n in range(37)], 8, seed=seed)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    texts, image_ids = texts[order], image_ids[order]  # captions of an image need not stand together
    ranks = paired_ranks(images, texts, image_ids)
    assert (ranks.image_to_text.tolist(), ranks.text_to_image.tolist()) == plain_ranks(images, texts, image_ids)


def test_recalls_are_those_of_clip_benchmark():
    images, texts, image_ids = make_pairs(300, [5] * 300, 32, noise=0.35)
    ranks = paired_ranks(images, texts, image_ids)
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_ids] = True
    for k in (1, 5, 10):
        by_text = (batchify(recall_at_k, scores, positive, 64, "cpu", k=k) > 0).float().mean().item()
        by_image = (batchify(recall_at_k, scores.T, positive.T, 64, "cpu", k=k) > 0).float().mean().item()
        assert recall_at(ranks.text_to_image, k) == pytest.approx(by_text, abs=1e-6)
        assert recall_at(ranks.image_to_text, k) == pytest.approx(by_image, abs=1e-6)
        assert 0.05 < by_text < 0.999


@pytest.mark.parametrize("kept", [0, 2**25])
def test_chunks_change_nothing(monkeypatch, kept):
    images, texts, image_ids = make_pairs(30, [3] * 30, 8)
    whole = paired_ranks(images, texts, image_ids)
    monkeypatch.setattr(metrics, "_CHUNK_SCORES_CPU", 1)
    monkeypatch.setattr(metrics, "_MIN_CHUNK_TEXTS", 7)
    monkeypatch.setattr(metrics, "_KEPT_SCORES", kept)
    parts = paired_ranks(images, texts, image_ids)
    assert torch.equal(whole.text_to_image, parts.text_to_image)
    assert torch.equal(whole.image_to_text, parts.image_to_text)


def test_model_that_tells_nothing_apart_scores_by_chance():
    same = F.normalize(torch.ones(1, 16) + torch.arange(16) / 7, dim=1)
    image_ids = torch.arange(20).repeat_interleave(2)
    ranks = paired_ranks(same.expand(20, 16), same.expand(40, 16), image_ids)
    assert ranks.text_to_image.tolist() == (image_ids + 1).tolist()
    assert ranks.image_to_text.tolist() == list(range(1, 41, 2))


def test_doubled_images_and_captions_rank_by_their_place():
    images, texts, image_ids = make_pairs(12, [1] * 12, 6, noise=0.01)
    images[7], texts[7] = images[3], texts[3]
    ranks = paired_ranks(images, texts, image_ids)
    assert (ranks.text_to_image[3], ranks.text_to_image[7]) == (1, 2)
    assert (ranks.image_to_text[3], ranks.image_to_text[7]) == (1, 2)


def test_images_without_captions_are_candidates_but_no_queries():
    images, texts, image_ids = make_pairs(6, [1, 0, 2, 0, 1, 1], 5)
    ranks = paired_ranks(images, texts, image_ids)
    assert ranks.image_to_text.shape == (4,)
    assert ranks.text_to_image.shape == (5,)


def test_lengths_of_vectors_count_as_in_any_inner_product():
    images, texts, image_ids = make_pairs(25, [2] * 25, 8)
    texts = texts * torch.linspace(0.1, 50, len(texts))[:, None]
    ranks = paired_ranks(images, texts, image_ids)
    assert (ranks.image_to_text.tolist(), ranks.text_to_image.tolist()) == plain_ranks(images, texts, image_ids)


def test_rows_rank_their_best_right_answer():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.2]])
    assert ranks_in_rows(scores, torch.tensor([8, 9]), torch.tensor([8, 9, 8, 9])).tolist() == [3, 2]


def test_recall_counts_ranks_up_to_k():
    ranks = torch.tensor([1, 2, 5, 6, 11])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]


def test_median_lies_between_the_two_middle_ranks():
    assert median_rank(torch.tensor([9, 1, 4])) == 4
    assert median_rank(torch.tensor([9, 1, 4, 5])) == 4.5
