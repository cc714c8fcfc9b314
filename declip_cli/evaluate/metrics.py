"""Scores as pure functions of predictions; ranks of the right answers, counted in chunks, exact also at ties."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_SCORES_CPU = 5 * 2**18
"""Scores compared at once on a CPU: they stay in the cache, and the product is not cut too thin (measured)."""
_MIN_CHUNK_TEXTS = 128
_CHUNK_SCORES_GPU = 2**26
_KEPT_SCORES = 2**25
"""At most so many scores, 128 MiB, are kept from the first pass for the second; more are computed again."""


def top_k_accuracy(ranked: Tensor, labels: Tensor, k: int) -> float:
    """Return how often the right class is among the first k, a fraction in [0, 1].

    Args:
        ranked: classes of each sample, best first, int64, (N, K) with K >= k.
        labels: the right class, int64, (N,).
        k: how many count.
    """
    hits = (ranked[:, :k] == labels[:, None]).any(dim=1)  # (N,)
    return int(hits.sum()) / len(labels)


def per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Take the accuracy within each of C classes, of predicted and right classes, both int64, (N,).

    Returns:
        Accuracy, float64, (C,), not a number for a class without samples; and samples per class, int64, (C,).
    """
    counts = torch.bincount(labels, minlength=num_classes)  # (C,)
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)  # (C,)
    return hits.double() / counts, counts


def mean_per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Average the accuracies of C classes, each counting the same; arguments as in `per_class_accuracy`.

    Returns:
        A fraction in [0, 1]; classes without samples are left out.

    Source: CLIP, arXiv 2103.00020, table 9, "mean per class".
    """
    accuracy, counts = per_class_accuracy(predicted, labels, num_classes)
    return float(accuracy[counts > 0].mean())


def chance_accuracy(num_classes: int, k: int = 1) -> float:
    """Return what guessing k different classes reaches, in accuracy as in mean per class."""
    return min(1.0, k / num_classes)


def recall_at(ranks: Tensor, k: int) -> float:
    """Return the fraction of ranks, 1 is the best, int64, (N,), that are at most k."""
    return int((ranks <= k).sum()) / len(ranks)


def median_rank(ranks: Tensor) -> float:
    """Return the middle rank, or halfway between the two middle ones."""
    ordered = ranks.sort().values
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else float(ordered[middle - 1 : middle + 1].double().mean())


@dataclass(frozen=True, slots=True)
class Ranks:
    """Places of the right answers, 1 is the best."""

    image_to_text: Tensor
    """For each image with a caption, the place of its best caption among all texts, int64, (N',)."""
    text_to_image: Tensor
    """For each text, the place of its image among all images, int64, (M,)."""


def paired_ranks(images: Tensor, texts: Tensor, image_ids: Tensor) -> Ranks:
    """Rank right answers by inner product, both ways.

    Candidates are ordered by score; of equal scores the one that stands earlier in the set comes first, so
    that a model that maps everything to one point scores by chance and not perfectly.

    Args:
        images: (N, D).
        texts: captions of these images, (M, D).
        image_ids: the image of each text, int64, (M,).

    Returns:
        The ranks; images without a caption are omitted from `image_to_text`.
    """
    budget = _CHUNK_SCORES_CPU if images.device.type == "cpu" else _CHUNK_SCORES_GPU
    pieces = texts.split(max(_MIN_CHUNK_TEXTS, budget // len(images)))
    kept = [piece @ images.T for piece in pieces] if len(texts) * len(images) <= _KEPT_SCORES else []

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:  # (n,), (n, N); the same products give the same bits
        indices = torch.arange(len(texts), device=texts.device).split(len(pieces[0]))
        yield from zip(indices, kept or (piece @ images.T for piece in pieces), strict=True)

    own = torch.cat([scores.gather(1, image_ids[rows, None])[:, 0] for rows, scores in chunks()])  # (M,)
    best = own.new_full((len(images),), -torch.inf).scatter_reduce_(0, image_ids, own, "amax")  # (N,)
    positions = torch.arange(len(images), device=images.device)  # (N,)
    is_best = own == best[image_ids]  # (M,)
    firsts = torch.where(is_best, torch.arange(len(texts), device=texts.device), len(texts))  # (M,)
    first_best = torch.full_like(positions, len(texts)).scatter_reduce_(0, image_ids, firsts, "amin")  # (N,)
    image_ranks, text_ranks = torch.ones_like(positions), []
    for rows, scores in chunks():
        text_ranks.append(1 + _num_before(scores, positions, own[rows], image_ids[rows]))
        image_ranks += _num_before(scores.T, rows, best, first_best)
    return Ranks(image_to_text=image_ranks[torch.isfinite(best)], text_to_image=torch.cat(text_ranks))


def _num_before(scores: Tensor, columns: Tensor, own: Tensor, own_columns: Tensor) -> Tensor:
    """Count the candidates of each row that come before its own: scores (n, C) of ascending columns (C,); (n,)."""
    flags = torch.empty_like(scores)  # (n, C); comparing into floats is several times faster than into bools
    num_above = torch.gt(scores, own[:, None], out=flags).sum(1).long()  # (n,)
    num_equal = torch.ge(scores, own[:, None], out=flags).sum(1).long() - num_above  # (n,)
    has_own = (own_columns >= columns[0]) & (own_columns <= columns[-1])  # (n,)
    tied = (num_equal > has_own.long()).nonzero()[:, 0]  # (t,)
    is_before = (scores[tied] == own[tied, None]) & (columns < own_columns[tied, None])  # (t, C)
    return num_above.index_add_(0, tied, is_before.sum(1))


def ranks_in_rows(scores: Tensor, row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Rank the best right answer of each row.

    Args:
        scores: (n, M).
        row_ids: int64, (n,).
        column_ids: a column is a right answer of the row with the same id, int64, (M,).

    Returns:
        Places, 1 is the best, int64, (n,); of equal scores the earlier column comes first.
    """
    is_right = row_ids[:, None] == column_ids  # (n, M)
    best = scores.masked_fill(~is_right, -torch.inf).amax(1)  # (n,)
    columns = torch.arange(scores.shape[1], device=scores.device)  # (M,)
    is_best = is_right & (scores == best[:, None])  # (n, M)
    first_best = torch.where(is_best, columns, scores.shape[1]).amin(1)  # (n,)
    return 1 + _num_before(scores, columns, best, first_best)
