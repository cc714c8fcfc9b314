"""Ranks of the right answers among all candidates, counted in chunks: exact, with no score matrix kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_SCORES_CPU = 5 * 2**18
"""Scores held at once on a CPU: they stay in the cache, and the product is not cut too thin (measured)."""
_MIN_CHUNK_TEXTS = 128
_CHUNK_SCORES_GPU = 2**26
_NO_SCORE = -torch.inf


@dataclass(frozen=True, slots=True)
class Ranks:
    """Places of the right answers, 1 is the best."""

    image_to_text: Tensor
    """For each picture with a caption, the place of its best caption among all texts, int64, (N',)."""
    text_to_image: Tensor
    """For each text, the place of its picture among all pictures, int64, (M,)."""


def paired_ranks(images: Tensor, texts: Tensor, owners: Tensor) -> Ranks:
    """Rank right answers by inner product, both ways.

    Candidates are ordered by score; of equal scores the one that stands earlier in the set comes first, so
    that a model that maps everything to one point scores by chance and not perfectly.

    Args:
        images: (N, D).
        texts: captions of these pictures, (M, D).
        owners: the picture of each text, int64, (M,).

    Returns:
        The ranks; pictures without a caption are left out of `image_to_text`.
    """
    count = _PairCount(images, texts, owners)
    text_ranks = torch.empty_like(owners)  # (M,)
    for first in range(0, len(texts), count.chunk):
        rows = slice(first, first + count.chunk)
        text_ranks[rows] = count.add(rows)
    return Ranks(image_to_text=count.image_ranks(), text_to_image=text_ranks)


class _PairCount:
    """Count, text chunk by text chunk, how many texts score above each picture's best caption.

    The best caption's score must be known before its chunk is reached. It is first computed pair by pair,
    which differs from the matrix product in the last bits; a picture with another text inside that margin is
    counted again, from one row of exact scores.
    """

    def __init__(self, images: Tensor, texts: Tensor, owners: Tensor) -> None:
        self._images, self._texts, self._owners = images, texts, owners
        is_cpu = images.device.type == "cpu"
        fitting = (_CHUNK_SCORES_CPU if is_cpu else _CHUNK_SCORES_GPU) // len(images)
        self.chunk = max(_MIN_CHUNK_TEXTS, fitting) if is_cpu else max(1, fitting)
        best = images.new_full((len(images),), _NO_SCORE)  # (N,)
        pieces = zip(texts.split(self.chunk), owners.split(self.chunk), strict=True)
        own = torch.cat([(part * images[numbers]).sum(1) for part, numbers in pieces])  # (M,)
        best.scatter_reduce_(0, owners, own, "amax")
        self._has_text = torch.isfinite(best)  # (N,)
        reach = float(images.norm(dim=1).max() * texts.norm(dim=1).max())
        margin = 2 * images.shape[1] ** 0.5 * torch.finfo(images.dtype).eps * reach
        self._low, self._high = best - margin, best + margin  # (N,)
        self._surely_above = torch.zeros_like(best, dtype=torch.int64)  # (N,)
        self._maybe_above = torch.zeros_like(self._surely_above)  # (N,)

    def add(self, rows: slice) -> Tensor:
        """Count one chunk of texts and return the ranks of their pictures, (n,)."""
        owners = self._owners[rows, None]  # (n, 1)
        scores = self._texts[rows] @ self._images.T  # (n, N)
        flags = torch.empty_like(scores)  # (n, N); comparing into floats is several times faster than into bools
        own = scores.gather(1, owners)  # (n, 1)
        above = torch.gt(scores, own, out=flags).sum(1).long()  # (n,)
        tied = (torch.ge(scores, own, out=flags).sum(1).long() - above) > 1  # (n,)
        if bool(tied.any()):
            above[tied] += _earlier_equals(scores[tied], own[tied], owners[tied])
        scores.scatter_(1, owners, _NO_SCORE)
        self._surely_above += torch.gt(scores, self._high, out=flags).sum(0).long()
        self._maybe_above += torch.gt(scores, self._low, out=flags).sum(0).long()
        return above + 1

    def image_ranks(self) -> Tensor:
        """Return the ranks of all pictures with captions, once all texts are counted."""
        ranks = self._surely_above + 1  # (N,)
        unclear = (self._has_text & (self._maybe_above > self._surely_above)).nonzero()[:, 0]  # (n,)
        for numbers in unclear.split(max(1, self.chunk * len(self._images) // len(self._texts))):
            scores = self._images[numbers] @ self._texts.T  # (n, M)
            ranks[numbers] = ranks_in_rows(scores, numbers, self._owners)
        return ranks[self._has_text]


def _earlier_equals(scores: Tensor, own: Tensor, places: Tensor) -> Tensor:
    """Count the equal scores that stand before the own one, (n,)."""
    order = torch.arange(scores.shape[1], device=scores.device)  # (N,)
    return ((scores == own) & (order < places)).sum(1)


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
    best = scores.masked_fill(~is_right, _NO_SCORE).amax(1, keepdim=True)  # (n, 1)
    order = torch.arange(scores.shape[1], device=scores.device)  # (M,)
    is_best = is_right & (scores == best)  # (n, M)
    place = torch.where(is_best, order, scores.shape[1]).amin(1, keepdim=True)  # (n, 1)
    return (scores > best).sum(1) + _earlier_equals(scores, best, place) + 1
