"""The losses against plain loops written from the papers' equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from declip_cli.losses import (
    masked_cross_entropy,
    negative_cosine,
    nt_xent,
)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def log_sum_exp(values):
    return math.log(sum(math.exp(value) for value in values))


def test_negative_cosine_gives_the_target_no_gradient():
    p, z = unit(4, 8).requires_grad_(), unit(4, 8, seed=1).requires_grad_()
    negative_cosine(p, z).backward()
    assert p.grad is not None
    assert z.grad is None


def test_negative_cosine_is_minus_the_mean_cosine_whatever_the_lengths():
    p, z = unit(3, 7), unit(3, 7, seed=1)
    expected = -sum(dot(a, b) for a, b in zip(p, z, strict=True)) / 3
    lengths = torch.tensor([[0.1], [2.0], [30.0]])
    assert negative_cosine(p * lengths, z * 5).item() == pytest.approx(expected, rel=1e-5)
    assert negative_cosine(p, 3 * p).item() == pytest.approx(-1.0)


def test_nt_xent_equals_equation_1_of_simclr():
    views, temperature = unit(5, 2, 6), 0.1
    # z_2k-1 and z_2k are the two views of image k; 2N rows in all.
    rows = [views[image, view] for image in range(5) for view in (0, 1)]
    expected = 0.0
    for i in range(10):
        partner = i + 1 if i % 2 == 0 else i - 1
        logits = {k: dot(rows[i], rows[k]) / temperature for k in range(10) if k != i}
        expected += (log_sum_exp(logits.values()) - logits[partner]) / 10
    loss = nt_xent(views, views, torch.arange(5), temperature=temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_nt_xent_of_two_ranks_averages_to_that_of_one():
    views = unit(6, 2, 5)
    whole = nt_xent(views, views, torch.arange(6), temperature=0.2)
    halves = [nt_xent(views[s : s + 3], views, torch.arange(s, s + 3), temperature=0.2) for s in (0, 3)]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_nt_xent_is_log_of_2m_minus_1_when_nothing_is_told_apart():
    same = unit(1, 1, 4).expand(7, 2, 4)
    assert nt_xent(same, same, torch.arange(7), temperature=0.5).item() == pytest.approx(math.log(13), rel=1e-6)


def test_masked_cross_entropy_adds_up_per_text():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    labels, text_ids = torch.tensor([3, 0, 10, 3]), torch.tensor([0, 2, 2, 2])
    expected = [0.0, 0.0, 0.0, 0.0, 0.0]
    for row, label, owner in zip(logits.tolist(), labels.tolist(), text_ids.tolist(), strict=True):
        expected[owner] += log_sum_exp(row) - row[label]
    found = masked_cross_entropy(logits, labels, text_ids, num_texts=5)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_masked_cross_entropy_of_no_masked_token_is_zero_with_gradient():
    logits = torch.zeros(0, 11, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = masked_cross_entropy(logits, none, none, num_texts=3)
    assert found.tolist() == [0.0, 0.0, 0.0]
    found.sum().backward()
    assert logits.grad.shape == (0, 11)
