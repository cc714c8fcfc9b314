"""The losses of the family as pure functions of tensors: no device, no rank, no state."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Distinguish the other view of the same image from all other views of all images.

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


def masked_cross_entropy(logits: Tensor, labels: Tensor, text_ids: Tensor, *, num_texts: int) -> Tensor:
    """Add up the cross-entropy of predicted tokens, text by text.

    Args:
        logits: scores of the vocabulary at the masked positions only, (K, V).
        labels: the hidden ids, int64, (K,).
        text_ids: the text each position belongs to, int64, (K,).
        num_texts: number of texts, B.

    Returns:
        Sum per text in nats, 0 for a text without masked tokens, (B,).

    Source: BERT, arXiv 1810.04805; DeCLIP, arXiv 2110.05208, section 3.2.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")  # (K,)
    return torch.zeros(num_texts, device=losses.device).index_add(0, text_ids, losses)


def word_cross_entropy(logits: Tensor, words: Tensor, rarity: Tensor) -> Tensor:
    """Score how well the set of a caption's words was predicted, rare ones first.

    Args:
        logits: scores of the V words that can be predicted, (B, V).
        words: the words of each caption, each once, -1 elsewhere, int64, (B, L).
        rarity: weight of each word, not negative, (V,).

    Returns:
        Cross-entropy with the caption's words, weighted and then scaled to sum 1, in nats, (B,); 0 for a caption
        without a word of weight.

    Source: SuperCLIP, arXiv 2512.14480.
    """
    places = words.clamp_min(0)
    weights = torch.where(words >= 0, rarity.float()[places], 0.0)  # (B, L)
    shares = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scores = logits.float()
    return scores.logsumexp(1) * shares.sum(1) - (scores.gather(1, places) * shares).sum(1)
