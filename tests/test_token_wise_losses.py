"""The late interaction against plain loops written from FILIP's equations."""

import pytest
import torch
import torch.nn.functional as F

from declip_cli import token_wise_losses
from declip_cli.token_wise_losses import most_relevant_tokens, token_wise_similarity


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(dtype)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def case(dtype=torch.float32):
    queries, keys = unit(5, 4, 6, dtype=dtype).requires_grad_(), unit(7, 3, 6, seed=1, dtype=dtype).requires_grad_()
    return queries, keys, torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])


def plain(queries, keys, query_mask):
    """Compute equations 3 to 5 as they stand, → scores, (B, M)."""
    rows = []
    for query, mask in zip(queries, query_mask, strict=True):
        rows.append(torch.stack([(query[mask] @ key.T).max(1).values.mean() for key in keys]))
    return torch.stack(rows)


def test_most_relevant_tokens_are_those_with_the_largest_summed_similarity():
    tokens, partners = unit(3, 9, 5), unit(3, 4, 5, seed=1)
    mask = torch.arange(9) < torch.tensor([[9], [6], [5]])
    partner_mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    kept = most_relevant_tokens(tokens, partners, mask=mask, partner_mask=partner_mask, top_k=6)
    assert kept.shape == (3, 6, 5)
    for b in range(3):
        relevance = {
            t: sum(dot(tokens[b, t], partners[b, p]) for p in range(4) if partner_mask[b, p])
            for t in range(9)
            if mask[b, t]
        }
        best = sorted(relevance, key=relevance.get, reverse=True)[:6]
        assert torch.equal(kept[b, : len(best)], tokens[b, best])


def test_a_text_of_few_tokens_fills_its_rows_with_its_most_relevant_one():
    tokens, mask = unit(2, 3, 5), torch.tensor([[True, True, True], [True, False, False]])
    everything = torch.ones(2, 4, dtype=torch.bool)
    kept = most_relevant_tokens(tokens, unit(2, 4, 5, seed=1), mask=mask, partner_mask=everything, top_k=7)
    assert kept.shape == (2, 7, 5)
    assert torch.equal(kept[0, 3:], kept[0, :1].expand(4, -1))
    assert {tuple(row) for row in kept[0].tolist()} == {tuple(row) for row in tokens[0].tolist()}
    assert torch.equal(kept[1], tokens[1, :1].expand(7, -1))


def test_token_wise_similarity_equals_equations_3_to_5_of_filip():
    queries, keys, query_mask = case()
    expected = torch.zeros(5, 7)
    for i in range(5):
        for j in range(7):
            best = [max(dot(queries[i, k], keys[j, r]) for r in range(3)) for k in range(4) if query_mask[i, k]]
            expected[i, j] = sum(best) / len(best)
    found = token_wise_similarity(queries, keys, query_mask=query_mask)
    torch.testing.assert_close(found.detach(), expected)


def test_its_gradient_is_that_of_the_equations():
    queries, keys, query_mask = case(torch.float64)
    weights = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((plain(queries, keys, query_mask) * weights).sum(), (queries, keys))
    scores = token_wise_similarity(queries, keys, query_mask=query_mask)
    for found, wanted in zip(torch.autograd.grad((scores * weights).sum(), (queries, keys)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda q, k: token_wise_similarity(q, k, query_mask=query_mask), (queries, keys))


@pytest.mark.parametrize(("elements", "rows"), [(1, 1), (24, 8), (60, 100), (4 * 3 * 7, 8)])
def test_blocks_change_neither_scores_nor_gradients(elements, rows, monkeypatch):
    results = []
    for sizes in ((2**22, 2**14), (elements, rows)):
        monkeypatch.setitem(token_wise_losses.BLOCK_ELEMENTS, "cpu", sizes[0])
        monkeypatch.setattr(token_wise_losses, "BLOCK_ROWS", sizes[1])
        queries, keys, query_mask = case()
        scores = token_wise_similarity(queries, keys, query_mask=query_mask)
        scores.pow(2).sum().backward()
        results.append((scores.detach(), queries.grad, keys.grad))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole)


def test_more_keys_than_a_byte_can_number_are_told_apart():
    queries, keys = unit(2, 3, 8), unit(2, 300, 8, seed=1).requires_grad_()
    everything = torch.ones(2, 3, dtype=torch.bool)
    (expected,) = torch.autograd.grad(plain(queries, keys, everything).sum(), keys)
    (found,) = torch.autograd.grad(token_wise_similarity(queries, keys, query_mask=everything).sum(), keys)
    torch.testing.assert_close(found, expected)


def test_under_autocast_similarities_are_bfloat16_and_sums_float32():
    queries, keys, query_mask = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = token_wise_similarity(queries, keys, query_mask=query_mask)
    scores.sum().backward()
    rounded = plain(queries.detach().bfloat16(), keys.detach().bfloat16(), query_mask)
    assert scores.dtype == queries.grad.dtype == torch.float32
    torch.testing.assert_close(scores.detach(), rounded.float(), rtol=0, atol=2e-2)
    means = [value for row in scores.tolist() for value in row]
    assert any(torch.tensor(value).bfloat16().item() != value for value in means)  # sums are not rounded


def test_similarities_are_never_held_all_at_once_but_one_byte_of_each_best_match_is():
    kept = []

    def keep(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    queries, keys, query_mask = case()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_wise_similarity(queries, keys, query_mask=query_mask)
    assert sorted(size for _, size in kept) == sorted([5 * 4 * 6, 7 * 3 * 6, 5 * 4, 5 * 4 * 7])
    assert (torch.uint8, 5 * 4 * 7) in kept


def test_a_query_without_tokens_scores_zero_and_not_nan():
    queries, keys, query_mask = case()
    query_mask = query_mask & (torch.arange(5) != 2)[:, None]
    scores = token_wise_similarity(queries, keys, query_mask=query_mask)
    scores.sum().backward()
    assert scores[2].tolist() == [0.0] * 7
    assert queries.grad[2].abs().sum() == 0
