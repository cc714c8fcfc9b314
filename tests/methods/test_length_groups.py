"""Texts encoded in groups of similar length: the same losses and gradients, and less padding."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch

from declip_cli.batch import Batch
from declip_cli.methods import length_groups
from declip_cli.methods.length_groups import encode_in_groups, group_bounds, group_texts
from declip_cli.methods.registry import METHODS
from declip_cli.model.text_transformer import END_ID
from declip_cli.train.grad_cache import forward_backward
from tests.methods.small_methods import build

LENGTHS = (3, 11, 4, 6, 3, 5, 9, 8)


def batch_of(method):
    """Draw eight pairs; texts have a "!" (id 0) inside, an early end in one, an end and padding behind it."""
    generator = torch.Generator().manual_seed(3)
    num, num_images, num_texts = len(LENGTHS), len(method.views.images), len(method.views.texts)
    tokens = torch.randint(1, 49406, (num, num_texts, 11), generator=generator)
    labels = torch.full((num, 11), -100)
    for pair, length in enumerate(LENGTHS):
        tokens[pair, :, 1] = 0
        tokens[pair, :, length - 1] = END_ID
        tokens[pair, :, length:] = 0
        labels[pair, 1 : length - 1 : 2] = 17 + pair
    tokens[1, 0, 5] = END_ID  # as masking leaves it where special ids may stand in for others
    images = torch.randint(0, 256, (num, num_images, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Batch(images=images, tokens=tokens, mlm_labels=labels, pair_indices=torch.arange(num))


def step(name, *, count_lengths, micro_batch_size=0, **options):
    """Take losses and gradients, and note the shapes of what the text tower encodes."""
    method, shapes = build(name, queue_start="random", **options), []
    layers = method.encoder.text.transformer
    layers.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    batch = batch_of(method)
    batch = batch.counted() if count_lengths else batch
    result = forward_backward(method, batch, micro_batch_size=micro_batch_size, autocast=nullcontext)
    gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    return result.terms, gradients, shapes


@pytest.fixture
def _calls_cost_nothing(monkeypatch):
    monkeypatch.setattr(length_groups, "_CALL_TOKENS", {"cpu": 0})


@pytest.mark.usefixtures("_calls_cost_nothing")
@pytest.mark.parametrize("micro_batch_size", [0, 5])
@pytest.mark.parametrize("name", METHODS)
def test_grouped_texts_have_the_losses_and_gradients_of_ungrouped_ones(name, micro_batch_size):
    expected, wanted, whole = step(name, count_lengths=False)
    terms, found, shapes = step(name, count_lengths=True, micro_batch_size=micro_batch_size)
    assert len(whole) == 1
    assert len(shapes) > 2
    for key, value in expected.terms.items():
        torch.testing.assert_close(terms.terms[key], value, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6 + 1e-6 * gradient.abs().max().item())


@pytest.mark.usefixtures("_calls_cost_nothing")
def test_tokens_are_looked_up_once_however_many_groups_there_are():
    method, lookups = build("declip", queue_start="random"), []
    method.encoder.text.token_embedding.register_forward_pre_hook(lambda module, inputs: lookups.append(inputs[0]))
    forward_backward(method, batch_of(method).counted(), micro_batch_size=0, autocast=nullcontext)
    assert [tuple(ids.shape) for ids in lookups] == [(8 * len(method.views.texts), 11)]


@pytest.mark.usefixtures("_calls_cost_nothing")
@pytest.mark.parametrize("name", ["filip", "defilip"])
def test_texts_whose_padding_is_scored_are_encoded_at_full_length(name):
    *_, shapes = step(name, count_lengths=True, score_padding=True)
    assert [length for _, length in shapes] == [11]


def test_rows_come_back_in_their_order_and_no_row_is_encoded_longer_than_its_group():
    lengths = torch.tensor([2, 5, 3, 2, 9, 3, 7])
    tokens = torch.arange(7)[:, None] * 10 + torch.arange(9)  # (7, 9)
    seen = []

    def tower(embedded):
        seen.append(tuple(embedded.shape[:2]))
        return embedded * torch.tensor([1.0, -1.0])  # (n, l, 2)

    embedded = tokens[..., None].float().expand(-1, -1, 2)
    states = encode_in_groups(tower, embedded, group_texts(lengths, call_tokens=0))
    assert states.shape == (7, 9, 2)
    for row, length in enumerate(lengths.tolist()):
        assert states[row, :length, 1].tolist() == (-tokens[row, :length]).tolist()
    assert len(seen) == 4
    assert sum(num * length for num, length in seen) == 33  # as 2 · 2, 2 · 3, 1 · 5, 2 · 9


@pytest.mark.parametrize("call_tokens", [0, 3, 40, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_groups_encode_fewer_tokens(seed, call_tokens):
    lengths = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(seed))
    longest = max(lengths.tolist())

    def cost(bounds):
        return call_tokens * len(bounds) + sum(min(b for b in bounds if b >= length) for length in lengths.tolist())

    fewest = min(cost((*inner, longest)) for k in range(4) for inner in combinations(range(1, longest), k))
    bounds = group_bounds(lengths, call_tokens=call_tokens)
    assert bounds[-1] == longest
    assert len(bounds) <= 4
    assert cost(bounds) == fewest


def test_a_small_batch_is_encoded_in_one_call():
    *_, shapes = step("declip", count_lengths=True)
    assert len(shapes) == 1


def test_lengths_count_up_to_the_last_token_whatever_stands_before_it():
    method = build("declip")
    batch = batch_of(method).counted()
    assert batch.text_lengths[:, 0].tolist() == list(LENGTHS)
    parts = batch.to(torch.device("cpu")).split(5)
    assert [part.text_lengths[:, 1].tolist() for part in parts] == [list(LENGTHS[:5]), list(LENGTHS[5:])]


@pytest.mark.parametrize("size", [3, 4, 8])
def test_counted_labels_stand_where_they_are_in_each_part_of_a_batch(size):
    batch = batch_of(build("declip"))
    for part, plain in zip(batch.counted().split(size), batch.split(size), strict=True):
        assert part.mlm_positions.tolist() == [
            number for number, label in enumerate(plain.mlm_labels.flatten().tolist()) if label != -100
        ]
        assert int(part.mlm_counts.sum()) == len(part.mlm_positions)
