"""Batches filled up to few shapes: the same losses and gradients, and lengths that only grow."""

from contextlib import nullcontext

import pytest
import torch

from declip_cli.batch import Batch
from declip_cli.methods import length_groups
from declip_cli.methods.registry import METHODS
from declip_cli.methods.steady_shapes import SteadyShapes
from declip_cli.model.text_transformer import END_ID
from declip_cli.train.grad_cache import forward_backward
from tests.methods.small_methods import build


def batch_of(lengths, masked=(), *, num_images=1, num_texts=1, side=1):
    """Make counted pairs of noise whose texts have so many tokens; `masked` are the places to predict in each."""
    generator = torch.Generator().manual_seed(len(lengths))
    num, longest = len(lengths), max(lengths)
    tokens = torch.randint(1, 49406, (num, num_texts, longest), generator=generator)
    labels = torch.full((num, longest), -100)
    for pair, length in enumerate(lengths):
        tokens[pair, :, length - 1] = END_ID
        tokens[pair, :, length:] = 0
    for pair, places in enumerate(masked):
        labels[pair, list(places)] = 100 + pair
    images = torch.randint(0, 256, (num, num_images, side, side, 3), dtype=torch.uint8, generator=generator)
    return Batch(images=images, tokens=tokens, mlm_labels=labels, pair_indices=torch.arange(num)).counted()


def shapes_of(batch):
    return tuple(batch.tokens.shape), tuple(batch.mlm_positions.shape), batch.text_groups and batch.text_groups.shapes


@pytest.fixture
def _calls_cost_nothing(monkeypatch):
    monkeypatch.setattr(length_groups, "_CALL_TOKENS", {"cpu": 0})


@pytest.mark.usefixtures("_calls_cost_nothing")
@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_filled_up_batch_has_the_losses_and_gradients_of_the_batch(name, micro_batch_size):
    results = []
    for is_steady in (False, True):
        method = build(name, queue_start="random", weights={"words": 0.5})
        steady, embed = SteadyShapes(context_length=11, is_grouped=not method.views.pad_to_context), method.embed
        if is_steady:
            method.embed = lambda batch, steady=steady, embed=embed: embed(steady.fit(batch))
        has_masks = "masked" in method.views.texts
        # The second batch is shorter, has fewer masked tokens, and other texts are the long ones.
        for lengths, masked in (((9, 3, 4, 7, 5), [(1, 2), (1,), (2,)]), ((3, 4, 6, 5, 8), [(), (1,), (3, 2)])):
            batch = batch_of(
                lengths,
                masked if has_masks else (),
                num_images=len(method.views.images),
                num_texts=len(method.views.texts),
                side=16,
            )
            result = forward_backward(method, batch, micro_batch_size=micro_batch_size, autocast=nullcontext)
        results.append((result.terms.terms, {key: p.grad for key, p in method.named_parameters()}))
    (expected, wanted), (terms, found) = results
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value, rtol=1e-5, atol=1e-6)
    for key, gradient in wanted.items():
        assert (found[key] is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6 + 1e-6 * gradient.abs().max().item())


def test_a_position_keeps_its_token_where_texts_get_longer_and_minus_one_fills_up():
    batch = batch_of([5, 3], [(1, 3), (2,)])
    fitted = SteadyShapes(context_length=77, is_grouped=False).fit(batch)
    assert fitted.tokens.shape == (2, 1, 8)
    assert fitted.mlm_labels.shape == (2, 8)
    assert fitted.mlm_positions.tolist() == [1, 3, 8 + 2] + [-1] * 13


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 8), (6, 8), (7, 16), (14, 16), (70, 72), (71, 77), (77, 77)]
)  # a multiple of 8 with two to spare, at most the context
def test_lengths_are_rounded_up_to_multiples_of_eight_but_not_beyond_the_context(longest, expected):
    fitted = SteadyShapes(context_length=77, is_grouped=False).fit(batch_of([longest, 1]))
    assert fitted.tokens.shape[-1] == expected


@pytest.mark.usefixtures("_calls_cost_nothing")
def test_groups_keep_their_sizes_and_lengths_grow_only_where_a_batch_needs_it():
    steady = SteadyShapes(context_length=77, is_grouped=True)
    (first, second, third) = (
        steady.fit(batch_of(lengths)) for lengths in ([4, 20, 4, 4], [30, 4, 5, 4], [12, 3, 4, 9])
    )
    assert first.text_groups.shapes == ((3, 8), (1, 24))
    assert second.text_groups.shapes == ((3, 8), (1, 32))
    assert second.text_groups.order.tolist()[-1] == 0  # the longest is in the long group, wherever it stands
    assert third.text_groups.shapes == ((3, 16), (1, 32))  # 9 tokens are among the three shortest


def test_a_hundred_batches_of_web_captions_have_few_shapes():
    generator = torch.Generator().manual_seed(0)
    steady, found = SteadyShapes(context_length=77, is_grouped=True), set()
    for _ in range(100):
        lengths = (torch.randn(32, generator=generator) * 0.65 + 2.8).exp().long().clamp(4, 77)
        masked = [range(1, 1 + int(torch.randint(0, 6, (), generator=generator))) for _ in range(32)]
        batch = batch_of(
            lengths.tolist(), [[place for place in p if place < n] for p, n in zip(masked, lengths, strict=True)]
        )
        found.add(shapes_of(steady.fit(batch)))
    assert len(found) <= 6
