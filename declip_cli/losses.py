"""The losses of the family as pure functions of tensors: no device, no rank, no state."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_PAIR_ELEMENTS = 2**25
"""Token similarities held at once in the token-wise loss: 128 MiB in float32."""


def info_nce(
    query: Tensor, keys: Tensor, targets: Tensor, *, logit_scale: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Tell each query's own key from all the others.

    One direction of CLIP's symmetric loss. The original pair, the other views and the
    nearest neighbour all use it: only the arguments differ. Computed in float32 under autocast too.

    Args:
        query: unit length, (B, D).
        keys: unit length, gathered from all ranks, (M, D), M >= B.
        targets: the row of `keys` that matches each query, int64, (B,).
        logit_scale: what the cosine is multiplied by, already exponentiated, ().
        label_smoothing: share of the target spread evenly over all keys, in [0, 1].

    Returns:
        Mean cross-entropy over the B queries, in nats, ().

    Source: CLIP, arXiv 2103.00020, fig. 3.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = logit_scale.float() * query.float() @ keys.float().T  # (B, M)
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Pull the prediction from one view towards the projection of the other, whose gradient is stopped.

    Args:
        p: predictor output, (B, D).
        z: projector output of the other view, (B, D).

    Returns:
        Minus the mean cosine, in [-1, 1], ().

    Source: SimSiam, arXiv 2011.10566, algorithm 1.
    """
    return -F.cosine_similarity(p.float(), z.detach().float(), dim=-1).mean()


def nt_xent(queries: Tensor, keys: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    """Tell the other view of the same image from all other views of all images.

    Args:
        queries: both views of this rank's images, unit length, (B, 2, D).
        keys: both views of all ranks' images, unit length, (M, 2, D).
        rows: the row of `keys` that each image of this rank stands in, int64, (B,).
        temperature: what the cosine is divided by.

    Returns:
        Mean cross-entropy over the 2B queries among 2M − 1 candidates, in nats, ().

    Source: SimCLR, arXiv 2002.05709, equation 1, as SLIP (arXiv 2112.12750) uses it.
    """
    with torch.autocast(queries.device.type, enabled=False):
        flat_keys = keys.float().transpose(0, 1).flatten(0, 1)  # (2M, D): first views, then second views
        losses = []
        for view in (0, 1):
            logits = queries[:, view].float() @ flat_keys.T / temperature  # (B, 2M)
            own = (rows + view * len(keys))[:, None]
            logits = logits.scatter(1, own, float("-inf"))
            losses.append(F.cross_entropy(logits, rows + (1 - view) * len(keys)))
        return torch.stack(losses).mean()


def masked_cross_entropy(logits: Tensor, labels: Tensor, owners: Tensor, *, num_owners: int) -> Tensor:
    """Add up the cross-entropy of predicted tokens, text by text.

    Args:
        logits: scores of the vocabulary at the masked positions only, (K, V).
        labels: the hidden ids, int64, (K,).
        owners: the text each position belongs to, int64, (K,).
        num_owners: number of texts, B.

    Returns:
        Sum per text in nats, 0 for a text without masked tokens, (B,).

    Source: BERT, arXiv 1810.04805; DeCLIP, arXiv 2110.05208, section 3.2.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")  # (K,)
    return torch.zeros(num_owners, device=losses.device).index_add(0, owners, losses)


def most_relevant_tokens(
    tokens: Tensor, partners: Tensor, *, mask: Tensor, partner_mask: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Keep the tokens that have most to do with the pair's other side, so that few need to be gathered.

    Args:
        tokens: features to choose from, unit length, (B, L, Q).
        partners: features of the other side of the same pairs, unit length, (B, P, Q).
        mask: True where a token counts, bool, (B, L).
        partner_mask: likewise for the partners, (B, P).
        top_k: tokens to keep, K; where L is smaller, all are kept and rows that do not count are added.

    Returns:
        The kept features, (B, K, Q), and True where they count, (B, K).

    Source: prototype/model/filip.py: similarity with the own pair, summed over the partner's tokens.
    """
    num_missing = top_k - tokens.shape[1]
    if num_missing >= 0:  # every rank gathers K tokens, however long its own texts are
        return F.pad(tokens, (0, 0, 0, num_missing)), F.pad(mask, (0, num_missing))
    with torch.no_grad():
        counted = (partners * partner_mask[..., None]).sum(1, keepdim=True)  # (B, 1, Q)
        relevance = (tokens * counted).sum(2).masked_fill(~mask, float("-inf"))  # (B, L)
        best = relevance.topk(top_k, dim=1).indices  # (B, K)
    kept = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))
    return kept, mask.gather(1, best)


def token_wise_similarity(queries: Tensor, keys: Tensor, *, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """Score each image-text pair by its best-matching tokens.

    Each token of the query takes its best match among the key's tokens; the mean over the query's tokens is the
    score. Works through the queries in chunks that are computed again in backward, so that memory does not grow
    with B · M.

    Args:
        queries: token features, unit length, (B, P, Q).
        keys: token features of all ranks, unit length, (M, K, Q).
        query_mask: True where a query token counts, bool, (B, P).
        key_mask: likewise for the keys, (M, K).

    Returns:
        Scores in [-1, 1], (B, M).

    Source: FILIP, arXiv 2111.07783, equations 3 to 5.
    """
    size = max(1, _PAIR_ELEMENTS // (queries.shape[1] * keys.shape[0] * keys.shape[1]))
    rows = []
    for query, mask in zip(queries.split(size), query_mask.split(size), strict=True):
        if torch.is_grad_enabled() and len(queries) > size:
            rows.append(checkpoint(_pair_scores, query, keys, mask, key_mask, use_reentrant=False))
        else:
            rows.append(_pair_scores(query, keys, mask, key_mask))
    return torch.cat(rows)


def _pair_scores(query: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    num_queries, num_keys = len(query), len(keys)
    similarity = query.flatten(0, 1) @ keys.flatten(0, 1).T  # (B·P, M·K)
    similarity = similarity.view(num_queries, -1, num_keys, keys.shape[1])  # (B, P, M, K)
    best = similarity.masked_fill(~key_mask, -2.0).amax(3).float()  # (B, P, M)
    weight = query_mask.float() / query_mask.sum(1, keepdim=True).clamp_min(1)  # (B, P)
    return (best * weight[..., None]).sum(1)  # (B, M)
