"""FILIP's late interaction: which tokens are compared, and how well two sets of tokens match."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**22}
"""Token similarities held at once, by device: the cache of a processor is smaller."""
BLOCK_ELEMENTS_ON_A_GPU = 2**25
"""In bfloat16 64 MiB: enough work for each kernel."""
BLOCK_ROWS = 2**14
"""Query tokens in a block, so that blocks of large batches are not narrow."""


def most_relevant_tokens(tokens: Tensor, partners: Tensor, *, mask: Tensor, partner_mask: Tensor, top_k: int) -> Tensor:
    """Keep the tokens that have most to do with the pair's other side, so that few need to be gathered.

    Args:
        tokens: features to choose from, unit length, (B, L, Q).
        partners: features of the other side of the same pairs, unit length, (B, P, Q).
        mask: True where a token counts, at least once a row, bool, (B, L).
        partner_mask: the same for the partners, (B, P).
        top_k: tokens to keep, K.

    Returns:
        The kept features, the most relevant first, (B, K, Q). Where fewer than K count, the first is repeated: every
        row is a match that counts, and the best match is what it would be without the repetition.

    Source: prototype/model/filip.py: similarity with the own pair, summed over the partner's tokens.
    """
    with torch.no_grad():
        counted = (partners * partner_mask[..., None]).sum(1, keepdim=True)  # (B, 1, Q)
        relevance = (tokens * counted).sum(2).masked_fill(~mask, float("-inf"))  # (B, L)
        best = relevance.topk(min(top_k, tokens.shape[1]), dim=1).indices
        positions = torch.arange(top_k, device=tokens.device)
        best = best.gather(1, torch.where(positions < mask.sum(1, keepdim=True), positions, 0))  # (B, K)
    return tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))


def token_wise_similarity(queries: Tensor, keys: Tensor, *, query_mask: Tensor) -> Tensor:
    """Score each image-text pair by its best-matching tokens.

    Each token of the query takes its best match among the key's tokens; the mean over the query's tokens is the
    score. Similarities are computed in blocks, under autocast in its number format, and added up in float32; of each
    block, backward keeps only which key matched best: B · P · M bytes.

    Args:
        queries: token features, unit length, (B, P, Q).
        keys: token features of all ranks, unit length, all of which count, (M, K, Q).
        query_mask: True where a query token counts, bool, (B, P).

    Returns:
        Scores in [-1, 1], 0 for a query without tokens that count, (B, M).

    Source: FILIP, arXiv 2111.07783, equations 3 to 5.
    """
    kind = queries.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else queries.dtype
    weights = query_mask.to(torch.promote_types(queries.dtype, torch.float32))  # (B, P)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    scores: Tensor = _MeanBestMatch.apply(queries, keys, weights, dtype)  # type: ignore[no-untyped-call]
    return scores


class _MeanBestMatch(torch.autograd.Function):
    """Scores of queries (B, P, Q) and keys (M, K, Q) with weights (B, P) of the query tokens.

    In backward, the gradient of a token's best match goes to its place in an otherwise empty block of similarities,
    and two matrix products take it to both sides.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        low_queries, low_keys = queries.to(dtype), keys.to(dtype)
        scores = weights.new_empty(len(queries), len(keys))
        index_type = torch.uint8 if keys.shape[1] <= 256 else torch.int16
        best_keys = torch.empty(*queries.shape[:2], len(keys), dtype=index_type, device=keys.device)  # (B, P, M)
        for some_keys, some in _blocks(queries, keys):
            query, key = low_queries[some], low_keys[some_keys]  # (b, P, Q), (m, K, Q)
            similarity = query.flatten(0, 1) @ key.flatten(0, 1).T  # (b·P, m·K)
            best = similarity.view(*query.shape[:2], *key.shape[:2]).max(3)  # (b, P, m)
            scores[some, some_keys] = (best.values.to(scores.dtype) * weights[some, :, None]).sum(1)
            best_keys[some, :, some_keys] = best.indices
        ctx.save_for_backward(low_queries, low_keys, weights, best_keys)
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]  # noqa: ANN401
        queries, keys, weights, best_keys = ctx.saved_tensors
        to_queries = torch.zeros_like(queries, dtype=weights.dtype)
        to_keys = torch.zeros_like(keys, dtype=weights.dtype)
        for some_keys, some in _blocks(queries, keys):
            query, key = queries[some], keys[some_keys]
            pulls = gradient[some, None, some_keys] * weights[some, :, None]  # (b, P, m)
            spread = query.new_zeros(*pulls.shape, key.shape[1])  # (b, P, m, K)
            positions = best_keys[some, :, some_keys].long()
            spread.scatter_(3, positions[..., None], pulls.to(query.dtype)[..., None])
            similarity = spread.flatten(2).flatten(0, 1)  # (b·P, m·K)
            to_queries[some] += (similarity @ key.flatten(0, 1)).view_as(query)
            to_keys[some_keys] += (similarity.T @ query.flatten(0, 1)).view_as(key)
        return to_queries, to_keys, None, None


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """Divide all pairs of keys and queries into blocks of at most so many similarities, or of one pair."""
    num_queries = min(len(queries), max(1, BLOCK_ROWS // queries.shape[1]))
    num_elements = BLOCK_ELEMENTS.get(queries.device.type, BLOCK_ELEMENTS_ON_A_GPU)
    num_keys = max(1, num_elements // (num_queries * queries.shape[1] * keys.shape[1]))
    for key in range(0, len(keys), num_keys):
        for query in range(0, len(queries), num_queries):
            yield slice(key, key + num_keys), slice(query, query + num_queries)
