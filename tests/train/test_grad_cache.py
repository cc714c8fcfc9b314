"""Micro-batches give the gradient of the undivided batch, for every method."""

from contextlib import nullcontext

import pytest
import torch

from declip_cli.train.grad_cache import forward_backward
from tests.golden_files import golden_batch, golden_case, golden_method, load_golden


def gradients(name, *, micro_batch_size, faithful):
    golden = load_golden(name)
    method = golden_method(golden, faithful=faithful)
    result = forward_backward(method, golden_batch(golden), micro_batch_size=micro_batch_size, autocast=nullcontext)
    return result, {k: p.grad for k, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("method", ["clip", "slip", "filip", "declip", "defilip"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, faithful):
    name = golden_case(method)
    whole, expected = gradients(name, micro_batch_size=0, faithful=faithful)
    parts, found = gradients(name, micro_batch_size=3, faithful=faithful)
    assert parts.terms.total.item() == pytest.approx(whole.terms.total.item(), rel=1e-5)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        # Biases before a BatchNorm have zero gradient; what is found there is rounding noise.
        assert (found[key] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6, key
    torch.testing.assert_close(parts.embeddings.texts, whole.embeddings.texts, rtol=1e-4, atol=1e-5)


def test_running_statistics_of_a_resnet_count_each_batch_once():
    golden = load_golden(golden_case("clip", arch="rn"))
    method = golden_method(golden)
    forward_backward(method, golden_batch(golden), micro_batch_size=4, autocast=nullcontext)
    assert int(method.encoder.visual.bn1.num_batches_tracked) == 2


@pytest.mark.parametrize("method", ["clip", "defilip"])
def test_a_frozen_tower_needs_no_gradient_of_the_parts(method):
    golden = load_golden(golden_case(method))
    trained = golden_method(golden, faithful=False)
    trained.encoder.visual.requires_grad_(False)
    forward_backward(trained, golden_batch(golden), micro_batch_size=3, autocast=nullcontext)
    assert all(parameter.grad is None for parameter in trained.encoder.visual.parameters())
    assert trained.encoder.text.token_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("arch", "expected"), [("vit", [4, 4, 1, 1, 1, 1, 1, 1, 1, 1]), ("rn", [1] * 16)])
def test_the_pass_without_graph_takes_four_micro_batches_at_once_unless_batch_norm_sees_them(arch, expected):
    golden = load_golden(golden_case("clip", arch=arch))
    method = golden_method(golden)
    batch = golden_batch(golden)
    sizes, embed = [], method.embed
    method.embed = lambda part: sizes.append(len(part)) or embed(part)
    forward_backward(method, batch, micro_batch_size=len(batch) // 8, autocast=nullcontext)
    assert sizes == expected
