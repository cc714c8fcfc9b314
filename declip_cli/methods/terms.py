"""Terms that several methods share: what is gathered, which rows match, which directions count."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from declip_cli.contrastive_losses import sigmoid_loss, softmax_loss, symmetric_softmax_loss
from declip_cli.distributed import Gathered, gather, rows_of_rank, sum_over_ranks, world_size
from declip_cli.losses import negative_cosine, nt_xent
from declip_cli.model.clip import normalize
from declip_cli.model.heads import SimClrHead, SimSiamPredictor, SimSiamProjector


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """How pairs of images and texts are distinguished."""

    ids: Gathered
    """Identities of each pair, int64, (B, I); pairs that share one are positives of each other."""
    scale: Tensor
    """Exponentiated logit scale, ()."""
    bias: Tensor | None = None
    """Logit bias of the sigmoid loss, (); None takes the softmax."""
    label_smoothing: float = 0.0
    """Of the softmax, in [0, 1]."""


def own_ids(num_local: int, device: torch.device) -> Gathered:
    """Give every pair of a step an identity of its own: its row of the gathered batch, int64, (B, 1) and (M, 1)."""
    rows = rows_of_rank(num_local, device)
    return Gathered(rows[:, None], lambda: torch.arange(num_local * world_size(), device=device)[:, None])


def contrastive_loss(images: Gathered, texts: Gathered, contrast: Contrast, *, is_symmetric: bool = True) -> Tensor:
    """Compare every view of every image with every view of every text.

    Args:
        images: unit length, (B, V, D).
        texts: unit length, (B, T, D).
        contrast: how.
        is_symmetric: from image to text and from text to image; else the former only. The sigmoid loss has no
            direction.

    Returns:
        Mean over all V · T pairs of views, and over the directions, in nats, ().

    Source: CLIP, arXiv 2103.00020, fig. 3; SigLIP, arXiv 2303.15343; multi-view: DeCLIP, arXiv 2110.05208, section 3.3.
    """
    scale, smoothing, ids = contrast.scale, contrast.label_smoothing, (contrast.ids.own, contrast.ids.all)
    if contrast.bias is not None:
        return sigmoid_loss(images.own, texts.all, ids, logit_scale=scale, logit_bias=contrast.bias)
    if is_symmetric and world_size() == 1:
        return symmetric_softmax_loss(images.own, texts.own, ids[0], logit_scale=scale, label_smoothing=smoothing)
    to_text = softmax_loss(images.own, texts.all, ids, logit_scale=scale, label_smoothing=smoothing)
    if not is_symmetric:
        return to_text
    return (to_text + softmax_loss(texts.own, images.all, ids, logit_scale=scale, label_smoothing=smoothing)) / 2


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
    z1, z2 = projector(embeds[:, 0]), projector(embeds[:, 1])  # (B, W) each; BatchNorm sees one view
    p1, p2 = predictor(z1), predictor(z2)
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


def simclr_loss(features: Tensor, head: SimClrHead, *, temperature: float) -> Tensor:
    """Distinguish the other view of an image from all views of all images.

    Args:
        features: of two views, before the projection into the shared embedding, (B, 2, E).
        head: SimCLR's.
        temperature: what the cosine is divided by.

    Returns:
        In nats, ().

    Source: SimCLR, arXiv 2002.05709, equation 1, as SLIP (arXiv 2112.12750) uses it.
    """
    queries = normalize(torch.stack([head(features[:, view]) for view in (0, 1)], dim=1))  # BatchNorm sees one view
    return nt_xent(queries, gather(queries), rows_of_rank(len(queries), queries.device), temperature=temperature)


def byol_loss(features: Tensor, target: Tensor, projector: nn.Module, predictor: nn.Module) -> Tensor:
    """Predict the teacher's projection of an image from each view of it.

    Args:
        features: of the views, before the projection into the shared embedding, (B, V, E).
        target: the teacher's projection, (B, 256); its gradient is stopped.
        projector: BYOL's.
        predictor: BYOL's.

    Returns:
        The mean over views of 2 − 2 cos, in [0, 4], ().

    Source: BYOL, arXiv 2006.07733, equation 2, as A-CLIP (arXiv 2212.08653) uses it.
    """
    predicted = [predictor(projector(view)) for view in features.unbind(1)]  # BatchNorm sees one view
    return torch.stack([2 + 2 * negative_cosine(one, target) for one in predicted]).mean()


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
