"""The contrastive losses against plain loops written from the papers' equations, and against OpenCLIP's."""

import math

import pytest
import torch
import torch.nn.functional as F

from declip_cli import contrastive_losses
from declip_cli.contrastive_losses import sigmoid_loss, softmax_loss, symmetric_softmax_loss

SCALE, BIAS = 9.0, -2.5


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def ids_of(*rows):
    return torch.tensor(rows)[:, None] if isinstance(rows[0], int) else torch.tensor(rows)


def are_positives(one, other):
    return bool(set(one.tolist()) & set(other.tolist()))


def loop_of_one_direction(queries, keys, ids, smoothing=0.0):
    """- sum_k q_k log p_k of each query, q even over its positives, smoothed over all keys."""
    total, num = 0.0, 0
    for v in range(queries.shape[1]):
        for t in range(keys.shape[1]):
            for i in range(len(queries)):
                logits = [SCALE * (queries[i, v] @ keys[j, t]) for j in range(len(keys))]
                log_sum = torch.logsumexp(torch.stack(logits), 0)
                positives = [are_positives(ids[0][i], ids[1][j]) for j in range(len(keys))]
                for logit, is_positive in zip(logits, positives, strict=True):
                    wanted = (1 - smoothing) * is_positive / sum(positives) + smoothing / len(keys)
                    total = total + wanted * (log_sum - logit)
                num += 1
    return total / num


def loop_of_siglip(images, texts, ids):
    """Algorithm 1: minus the sum of log sigmoid(m (t x y + b)), divided by the number of images."""
    total, num = 0.0, 0
    for v in range(images.shape[1]):
        for t in range(texts.shape[1]):
            for i in range(len(images)):
                for j in range(len(texts)):
                    sign = 1 if are_positives(ids[0][i], ids[1][j]) else -1
                    logit = SCALE * (images[i, v] @ texts[j, t]) + BIAS
                    total = total - torch.log(1 / (1 + torch.exp(-sign * logit)))
                num += 1
    return total / num


def value_and_gradients(loss, images, texts, **scalars):
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scalars = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in scalars.items()}
    value = loss(images, texts, **scalars)
    value.backward()
    return [value.detach(), images.grad, texts.grad, *(scalar.grad for scalar in scalars.values())]


ONE_EACH = (ids_of(0, 1, 2), ids_of(7, 0, 1, 2, 8))
SHARED = (ids_of([0, 10], [1, 11], [2, 10]), ids_of([0, 10], [1, 11], [2, 10], [3, 11], [2, 12]))
"""Images (first number) or captions (second) in common make positives: the second query has two, the third three."""


@pytest.mark.parametrize("ids", [ONE_EACH, SHARED], ids=["one each", "shared"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("block", [2**25, 1])
def test_one_direction_of_the_softmax_equals_the_loop(ids, smoothing, block, monkeypatch):
    monkeypatch.setattr(contrastive_losses, "BLOCK_ELEMENTS", block)
    queries, keys = unit(3, 2, 6), unit(5, 2, 6, seed=1)
    found = value_and_gradients(
        lambda q, k, scale: softmax_loss(q, k, ids, logit_scale=scale, label_smoothing=smoothing),
        queries,
        keys,
        scale=SCALE,
    )
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    expected = loop_of_one_direction(*leaves, ids, smoothing)
    expected.backward()
    torch.testing.assert_close(found[:3], [expected.detach(), leaves[0].grad, leaves[1].grad])
    torch.testing.assert_close(found[3], (leaves[0].grad * queries).sum() / SCALE)  # by the chain rule


@pytest.mark.parametrize("limit", [2**28, 1], ids=["one product", "two"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_both_directions_equal_the_loop_each_way(limit, smoothing, monkeypatch):
    monkeypatch.setattr(contrastive_losses, "WHOLE_ELEMENTS", limit)
    images, texts, ids = unit(4, 2, 6), unit(4, 2, 6, seed=1), ids_of([0, 10], [1, 11], [2, 10], [1, 12])
    found = value_and_gradients(
        lambda x, y, scale: symmetric_softmax_loss(x, y, ids, logit_scale=scale, label_smoothing=smoothing),
        images,
        texts,
        scale=SCALE,
    )
    leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
    there, back = (loop_of_one_direction(*pair, (ids, ids), smoothing) for pair in (leaves, leaves[::-1]))
    expected = (there + back) / 2
    expected.backward()
    torch.testing.assert_close(found[:3], [expected.detach(), leaves[0].grad, leaves[1].grad])


@pytest.mark.parametrize("ids", [ONE_EACH, SHARED], ids=["one each", "shared"])
@pytest.mark.parametrize("block", [2**25, 1])
def test_the_sigmoid_loss_equals_the_loop(ids, block, monkeypatch):
    monkeypatch.setattr(contrastive_losses, "BLOCK_ELEMENTS", block)
    images, texts = unit(3, 2, 6), unit(5, 2, 6, seed=1)
    found = value_and_gradients(
        lambda x, y, scale, bias: sigmoid_loss(x, y, ids, logit_scale=scale, logit_bias=bias),
        images,
        texts,
        scale=SCALE,
        bias=BIAS,
    )
    leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
    expected = loop_of_siglip(*leaves, ids)
    expected.backward()
    torch.testing.assert_close(found[:3], [expected.detach(), leaves[0].grad, leaves[1].grad])


def test_the_sigmoid_loss_and_its_gradients_equal_open_clips():
    peer = pytest.importorskip("open_clip.loss")
    images, texts, ids = unit(6, 1, 5), unit(6, 1, 5, seed=1), ids_of(*range(6))
    ours = value_and_gradients(
        lambda x, y, scale, bias: sigmoid_loss(x, y, (ids, ids), logit_scale=scale, logit_bias=bias),
        images,
        texts,
        scale=SCALE,
        bias=BIAS,
    )
    theirs = value_and_gradients(
        lambda x, y, scale, bias: peer.SigLipLoss()(x[:, 0], y[:, 0], scale, bias),
        images,
        texts,
        scale=SCALE,
        bias=BIAS,
    )
    torch.testing.assert_close(ours, theirs)


def test_the_softmax_is_log_m_when_nothing_is_told_apart():
    same, ids = unit(1, 1, 8).expand(6, 1, 8), ids_of(*range(6))
    loss = symmetric_softmax_loss(same, same, ids, logit_scale=torch.tensor(14.3))
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)


def test_losses_are_computed_in_float32_under_autocast():
    queries, keys, ids = unit(4, 1, 64).float(), unit(9, 1, 64, seed=1).float(), (ids_of(*range(4)), ids_of(*range(9)))
    options = {"logit_scale": torch.tensor(100.0)}
    losses = [
        lambda: softmax_loss(queries, keys, ids, **options),
        lambda: sigmoid_loss(queries, keys, ids, logit_bias=torch.tensor(-9.0), **options),
    ]
    for loss in losses:
        expected = loss()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(), expected)


def test_no_matrix_of_similarities_is_kept_for_backward():
    kept = []
    leaf = unit(40, 2, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        symmetric_softmax_loss(leaf, leaf, ids_of(*range(40)), logit_scale=torch.tensor(5.0))
    assert 0 < max(kept) <= leaf.numel()


def test_no_gradient_is_computed_for_neighbors_that_take_none():
    leaf, neighbors, ids = unit(3, 1, 4).requires_grad_(), unit(3, 1, 4, seed=1), ids_of(0, 1, 2)
    symmetric_softmax_loss(leaf, neighbors, ids, logit_scale=torch.tensor(5.0)).backward()
    assert neighbors.grad is None
    assert leaf.grad.norm() > 0
