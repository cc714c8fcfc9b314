"""Terms that several methods share: what is gathered, which rows match, which directions count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from declip_cli.distributed import gather, rows_of_rank, sum_over_ranks, world_size
from declip_cli.losses import info_nce, negative_cosine
from declip_cli.model.heads import SimSiamPredictor, SimSiamProjector

PAIRS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((0, 0),),
    2: ((0, 0), (1, 0)),
    4: ((0, 0), (1, 0), (0, 1), (1, 1)),
}
"""(image view, text view) of each contrastive pair, in the original's order (prototype/model/declip.py)."""


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


def simsiam_loss(embeds: Tensor, projector: SimSiamProjector, predictor: SimSiamPredictor) -> Tensor:
    """Predict each view's projection from the other's.

    Args:
        embeds: projected embeddings of two views, not normalized, (B, 2, D).
        projector: SimSiam's projector.
        predictor: SimSiam's predictor.

    Returns:
        In [-1, 1], ().

    Source: SimSiam, arXiv 2011.10566, algorithm 1; DeCLIP, arXiv 2110.05208, section 3.2.
    """
    z1, z2 = projector(embeds[:, 0]), projector(embeds[:, 1])  # (B, 1024) each; BatchNorm sees one view
    p1, p2 = predictor(z1), predictor(z2)
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


def neighbour_loss(images: Tensor, neighbours: Tensor, *, scale: Tensor, is_symmetric: bool) -> Tensor:
    """Match every view of an image with the neighbour of every view of its text; never label-smoothed.

    Args:
        images: unit length, (B, V, D).
        neighbours: the row of the queue nearest to each text, unit length, without gradient, (B, T, D).
        scale: exponentiated logit scale, ().
        is_symmetric: also from the neighbour to the image, as in the contrastive loss; the original only goes from
            the image to the neighbour.

    Returns:
        Mean over views, texts and directions, in nats, ().

    Source: DeCLIP, arXiv 2110.05208, section 3.4; prototype/model/declip.py:281-300.
    """
    pairs = [(view, text) for view in range(images.shape[1]) for text in range(neighbours.shape[1])]
    if is_symmetric:
        return contrastive_pairs(images, neighbours, pairs=pairs, scale=scale).mean()
    keys = gather(neighbours)  # (M, T, D)
    rows = rows_of_rank(len(images), images.device)
    return torch.stack([info_nce(images[:, v], keys[:, t], rows, logit_scale=scale) for v, t in pairs]).mean()


def mlm_loss(losses: Tensor, counts: Tensor, *, over_all_ranks: bool) -> Tensor:
    """Average the masked-language loss over masked tokens.

    Args:
        losses: sum per pair in nats, (B,).
        counts: masked tokens per pair, (B,).
        over_all_ranks: average over all ranks' tokens, so that the result does not depend on how pairs are spread
            over ranks; else over this rank's own, as the original does.

    Returns:
        Nats per token, (); 0 if no token is masked.

    Source: BERT, arXiv 1810.04805; prototype/model/declip.py:326-334.
    """
    if over_all_ranks:
        # Gradients are averaged over the ranks later, so this rank's share is scaled up by their number.
        return world_size() * losses.sum() / sum_over_ranks(counts.sum().detach()).clamp_min(1)
    return losses.sum() / counts.detach().sum().clamp_min(1)
