"""Terms that several methods share: what is gathered, which rows match, which directions count."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.distributed import gather, rows_of_rank, sum_over_ranks, world_size
from declip_cli.losses import info_nce, most_relevant_tokens, negative_cosine, token_wise_similarity
from declip_cli.model.heads import SimSiamPredictor, SimSiamProjector
from declip_cli.model.neighbours import NeighbourQueue

PAIRS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((0, 0),),
    2: ((0, 0), (1, 0)),
    4: ((0, 0), (1, 0), (0, 1), (1, 1)),
}
"""(image view, text view) of each contrastive pair, in the original's order (P/model/declip.py)."""


def contrastive_pairs(
    images: Tensor,
    texts: Tensor,
    *,
    pairs: Sequence[tuple[int, int]],
    scale: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute CLIP's symmetric loss for each chosen pair of views.

    Args:
        images: unit length, (B, V, D).
        texts: unit length, (B, T, D).
        pairs: (image view, text view) of each pair.
        scale: exponentiated logit scale, ().
        label_smoothing: in [0, 1].

    Returns:
        Loss of each pair, in nats, (number of pairs,).

    Source: CLIP, arXiv 2103.00020, fig. 3; multi-view: DeCLIP, arXiv 2110.05208, section 3.3.
    """
    all_images, all_texts = gather(images), gather(texts)  # (M, V, D), (M, T, D)
    rows = rows_of_rank(len(images), images.device)
    losses = []
    for view, text in pairs:
        to_text = info_nce(
            images[:, view], all_texts[:, text], rows, logit_scale=scale, label_smoothing=label_smoothing
        )
        to_image = info_nce(
            texts[:, text], all_images[:, view], rows, logit_scale=scale, label_smoothing=label_smoothing
        )
        losses.append((to_text + to_image) / 2)
    return torch.stack(losses)


def siamese(embeds: Tensor, projector: SimSiamProjector, predictor: SimSiamPredictor) -> Tensor:
    """Predict each view's projection from the other's.

    Args:
        embeds: projected embeddings of two views, not normalised, (B, 2, D).
        projector: SimSiam's projector.
        predictor: SimSiam's predictor.

    Returns:
        In [-1, 1], ().

    Source: SimSiam, arXiv 2011.10566, algorithm 1; DeCLIP, section 3.2.
    """
    z1, z2 = projector(embeds[:, 0]), projector(embeds[:, 1])  # (B, 1024) each; BatchNorm sees one view
    p1, p2 = predictor(z1), predictor(z2)
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


def nearest_neighbours(
    images: Tensor, texts: Tensor, queue: NeighbourQueue, *, scale: Tensor, both_directions: bool
) -> Tensor:
    """Match pictures with the texts nearest to their own.

    Args:
        images: unit length, (B, V, D).
        texts: unit length, (B, T, D).
        queue: earlier text features.
        scale: exponentiated logit scale, ().
        both_directions: also from the neighbour to the picture; the original only goes from the picture.

    Returns:
        Mean over views, texts and directions in nats, (); 0 while the queue is empty.

    Source: DeCLIP, arXiv 2110.05208, section 3.4; P/model/declip.py:281-300.
    """
    if queue.count() == 0:
        return images.sum() * 0.0
    found = queue.nearest(texts.flatten(0, 1)).view_as(texts)  # (B, T, D)
    pairs = [(view, text) for view in range(images.shape[1]) for text in range(texts.shape[1])]
    if both_directions:
        return contrastive_pairs(images, found, pairs=pairs, scale=scale).mean()
    all_found = gather(found)
    rows = rows_of_rank(len(images), images.device)
    losses = [info_nce(images[:, v], all_found[:, t], rows, logit_scale=scale) for v, t in pairs]
    return torch.stack(losses).mean()


def masked_language(losses: Tensor, counts: Tensor, *, per_rank: bool) -> Tensor:
    """Average the masked-language loss over masked tokens.

    Args:
        losses: sum per pair in nats, (B,).
        counts: masked tokens per pair, (B,).
        per_rank: average over this rank's tokens, as the original; else over all ranks' tokens, so that the
            result does not depend on how pairs are spread over ranks.

    Returns:
        Nats per token, (); 0 if no token is masked.
    """
    if per_rank:
        return losses.sum() / counts.detach().sum().clamp_min(1)
    # The mean over ranks is taken later, so this rank's share is scaled up by their number.
    return world_size() * losses.sum() / sum_over_ranks(counts.sum().detach()).clamp_min(1)


def token_wise(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor | None,
    *,
    scale: Tensor,
    top_k: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Tell pairs apart by their best-matching tokens, in both directions.

    Args:
        image_tokens: unit length, (B, P, Q).
        text_tokens: unit length, (B, L, Q).
        text_mask: True where a token counts; None counts padding too, (B, L).
        scale: exponentiated dense logit scale, ().
        top_k: tokens of each picture and text that are gathered and compared with.
        label_smoothing: in [0, 1].

    Returns:
        Nats, ().

    Source: FILIP, arXiv 2111.07783, section 3.2; P/model/filip.py.
    """
    everything = torch.ones(image_tokens.shape[:2], dtype=torch.bool, device=image_tokens.device)
    images = (image_tokens, everything)
    texts = (
        text_tokens,
        torch.ones_like(text_tokens[..., 0], dtype=torch.bool) if text_mask is None else text_mask,
    )
    rows = rows_of_rank(len(image_tokens), image_tokens.device)
    losses = []
    for (query, query_mask), (key, key_mask) in ((images, texts), (texts, images)):
        kept, kept_mask = most_relevant_tokens(key, query, mask=key_mask, partner_mask=query_mask, top_k=top_k)
        similarity = token_wise_similarity(
            query, gather(kept), query_mask=query_mask, key_mask=gather(kept_mask.to(torch.uint8)).bool()
        )
        losses.append(F.cross_entropy(scale * similarity, rows, label_smoothing=label_smoothing))
    return torch.stack(losses).mean()
