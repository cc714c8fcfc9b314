"""Losses that tell pairs of images and texts apart by whole embeddings, as pure functions of tensors.

All views are compared in one product. A block of queries is scored at a time, and its gradient is computed on the spot:
no matrix of similarities is kept for backward, and memory does not grow with the number of ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Ids: TypeAlias = tuple[Tensor, Tensor]
"""Identities of queries and keys, int64, (B, I) and (M, I): a query and a key that share one are positives."""
_Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes logits (b, V, T, M) and positives (b, M), returns the sum of losses and leaves its gradient in the logits."""
BLOCK_ELEMENTS = 2**25
"""Similarities of a block of queries: 128 MiB in float32."""
WHOLE_ELEMENTS = 2**28
"""Similarities up to which both directions are taken from the same product."""


def softmax_loss(
    queries: Tensor, keys: Tensor, ids: Ids, *, logit_scale: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Distinguish each query's own key from all others: one direction of CLIP's loss, in float32 under autocast too.

    Args:
        queries: unit length, V views, (B, V, D).
        keys: unit length, gathered from all ranks, T views, (M, T, D).
        ids: who is whose positive; the target is spread evenly over a query's positives.
        logit_scale: what the cosine is multiplied by, already exponentiated, ().
        label_smoothing: share of the target spread evenly over all keys, in [0, 1].

    Returns:
        Cross-entropy, the mean over queries and all V · T pairs of views, in nats, ().

    Source: CLIP, arXiv 2103.00020, fig. 3; several positives: UniCL, arXiv 2204.03610, equation 2.
    """
    score = partial(_score_softmax, dims=(1,), label_smoothing=label_smoothing)
    return _in_blocks(queries, keys, ids, score, logit_scale=logit_scale) / _num_terms(queries, keys)


def symmetric_softmax_loss(
    images: Tensor, texts: Tensor, ids: Tensor, *, logit_scale: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Compute both directions of `softmax_loss` between all images and all texts, which are on this rank.

    Args:
        images: unit length, (B, V, D).
        texts: unit length, (B, T, D).
        ids: of the pairs, int64, (B, I).
        logit_scale: as in `softmax_loss`.
        label_smoothing: as in `softmax_loss`.

    Returns:
        The mean of both directions, in nats, ().
    """
    options: dict[str, Any] = {"logit_scale": logit_scale, "label_smoothing": label_smoothing}
    if len(images) ** 2 * images.shape[1] * texts.shape[1] > WHOLE_ELEMENTS:
        there, back = ((images, texts), (texts, images))
        return (softmax_loss(*there, (ids, ids), **options) + softmax_loss(*back, (ids, ids), **options)) / 2
    score = partial(_score_softmax, dims=(1, 0), label_smoothing=label_smoothing)
    total = _in_blocks(images, texts, (ids, ids), score, logit_scale=logit_scale, num_rows=len(images))
    return total / (2 * _num_terms(images, texts))


def sigmoid_loss(images: Tensor, texts: Tensor, ids: Ids, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Decide for each image and each text whether they belong together.

    Args:
        images: unit length, (B, V, D).
        texts: unit length, gathered from all ranks, (M, T, D).
        ids: who is whose positive.
        logit_scale: what the cosine is multiplied by, already exponentiated, ().
        logit_bias: what is added to it, ().

    Returns:
        The sum over texts, the mean over images and all V · T pairs of views, in nats, ().

    Source: SigLIP, arXiv 2303.15343, algorithm 1.
    """
    total = _in_blocks(images, texts, ids, _score_sigmoid, logit_scale=logit_scale, logit_bias=logit_bias)
    return total / _num_terms(images, texts)


def _num_terms(queries: Tensor, keys: Tensor) -> int:
    return len(queries) * queries.shape[1] * keys.shape[1]


def _score_softmax(logits: Tensor, positives: Tensor, *, dims: tuple[int, ...], label_smoothing: float) -> Tensor:
    """Score a block in each of some directions: over the keys of a query (1), over the queries of a key (0)."""
    total, targets, counted = logits.new_zeros(()), list[Tensor](), positives.to(logits.dtype)
    for dim in dims:
        target = (1 - label_smoothing) / counted.sum(dim, keepdim=True) * counted  # (b, M)
        targets.append(target.add_(label_smoothing / positives.shape[dim]))
    for pair in logits.flatten(1, 2).unbind(1):  # (b, M)
        gradients = []
        for dim, target in zip(dims, targets, strict=True):
            log_share = F.log_softmax(pair, dim)
            total -= torch.dot(log_share.flatten(), target.flatten())
            gradients.append(log_share.exp_().sub_(target))
        if len(dims) == 1:
            pair.copy_(gradients[0])
        else:
            torch.add(*gradients, out=pair)
    return total


def _score_sigmoid(logits: Tensor, positives: Tensor) -> Tensor:
    positives = positives[:, None, None]  # (b, 1, 1, M)
    total = F.softplus(torch.where(positives, -logits, logits)).sum()
    logits.sigmoid_().sub_(positives.to(logits.dtype))
    return total


def _in_blocks(
    queries: Tensor,
    keys: Tensor,
    ids: Ids,
    score: _Score,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    num_rows: int = 0,
) -> Tensor:
    """Add up the scores of all blocks of `num_rows` queries; 0: as many as fit into `BLOCK_ELEMENTS`."""
    num_rows = num_rows or max(1, BLOCK_ELEMENTS // (queries.shape[1] * keys.shape[0] * keys.shape[1]))
    inputs = [_precise(value) for value in (queries, keys, logit_scale)]
    inputs.append(inputs[2].new_zeros(()) if logit_bias is None else _precise(logit_bias))
    with torch.autocast(queries.device.type, enabled=False):
        total: Tensor = _Blocks.apply(*inputs, ids, score, num_rows)  # type: ignore[no-untyped-call]
    return total


def _precise(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


class _Blocks(torch.autograd.Function):
    """The sum of the scores of all blocks, with a gradient that forward has computed already."""

    @staticmethod
    def forward(  # noqa: PLR0913  (autograd passes every input by place)
        ctx: Any,  # noqa: ANN401  (autograd's own type is untyped)
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Ids,
        score: _Score,
        num_rows: int,
    ) -> Tensor:
        by_view = keys.transpose(0, 1).flatten(0, 1)  # (T·M, D)
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(by_view)
        total, d_bias = torch.zeros_like(bias), torch.zeros_like(bias)
        for first in range(0, len(queries), num_rows):
            rows = slice(first, first + num_rows)
            query = scale * queries[rows].flatten(0, 1)  # (b·V, D)
            logits = (query @ by_view.T).add_(bias)  # (b·V, T·M)
            positives = find_positives(ids[0][rows], ids[1])  # (b, M)
            total += score(logits.view(len(positives), queries.shape[1], keys.shape[1], len(keys)), positives)
            # What is in the logits now is the gradient by them.
            d_queries[rows] = (scale * (logits @ by_view)).view_as(d_queries[rows])
            if ctx.needs_input_grad[1]:
                d_keys.addmm_(logits.T, query)
            if ctx.needs_input_grad[3]:
                d_bias += logits.sum()
        d_scale = (d_queries * queries).sum() / scale
        d_keys = d_keys.unflatten(0, (keys.shape[1], keys.shape[0])).transpose(0, 1)  # (M, T, D)
        ctx.save_for_backward(d_queries, d_keys, d_scale, d_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        return (*(weight * gradient for gradient in ctx.saved_tensors), None, None, None)


def find_positives(ids: Tensor, others: Tensor) -> Tensor:
    """Tell who has an identity in common, (b, I) and (M, I) → bool, (b, M)."""
    found = torch.zeros(len(ids), len(others), dtype=torch.bool, device=ids.device)
    for one in ids.unbind(1):
        for other in others.unbind(1):
            found |= one[:, None] == other
    return found
