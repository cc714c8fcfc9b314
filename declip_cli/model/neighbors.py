"""The queue of recent text features in which nearest neighbors are found."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNKNOWN = -1
"""Number of a row that belongs to no pair."""
_NOBODY = -2
"""Number of a query that belongs to no pair: no row has it."""
_BLOCK_ROWS = 8192
"""Rows compared at once on a CPU: with `max` per block 16 to 39 times as fast as one product and a top-k."""
_MAX_SCORES = 2**27
"""Largest number of scores at once on a GPU: 256 MiB in half precision; 65,536 rows and 2,048 queries."""
_GROUP_ROWS, _NUM_GROUPS = 16, 8
"""Screening keeps the best `_NUM_GROUPS` groups of `_GROUP_ROWS` consecutive rows; `_BLOCK_ROWS` is a multiple."""
_HALF_ERROR = 2.0**-9
"""Largest error of a float16 cosine: 2^-11 for either vector and for the result, and as much for sums."""


class NeighborQueue(nn.Module):
    """First-in, first-out rows of unit length, saved with the model's training state.

    Args:
        num_rows: queue size.
        dim: width of a row, D.
        exact: compare in float32 under autocast too, instead of screening in half precision first; what is found is
            the same.

    Source: NNCLR, arXiv 2104.14548; DeCLIP, arXiv 2110.05208, section 3.4. The original's queue lies on the
    CPU, is not saved, may return its random initial rows and drops what does not fit at the wrap; this one does not.
    """

    rows: Tensor
    """(queue size, D), unit length where filled."""
    pair_indices: Tensor
    """The pair each row belongs to, `UNKNOWN` if none, int64, (queue size,)."""
    next_row: Tensor
    """Where the next feature goes, int64, ()."""
    num_filled: Tensor
    """Rows that hold a feature, int64, ()."""

    def __init__(self, num_rows: int, dim: int, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.register_buffer("rows", torch.zeros(num_rows, dim))
        self.register_buffer("pair_indices", torch.full((num_rows,), UNKNOWN, dtype=torch.int64))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_filled", torch.zeros((), dtype=torch.int64))
        self._was_full = False
        self._half_rows: Tensor | None = None

    def count(self) -> int:
        """Return the number of rows that hold a feature; waits for the device only until all of them do."""
        if not self._was_full:
            num_filled = int(self.num_filled)
            self._was_full = num_filled == len(self.rows)
            return num_filled
        return len(self.rows)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        self._was_full, self._half_rows = False, None
        super()._load_from_state_dict(*arguments, **options)

    def fill_randomly(self) -> None:
        """Start with random directions that count as features, as the original does."""
        self.rows.copy_(F.normalize(torch.randn_like(self.rows), dim=1))
        self.num_filled.fill_(len(self.rows))
        self._half_rows = None

    @torch.no_grad()
    def nearest(self, queries: Tensor, pair_indices: Tensor | None = None) -> Tensor:
        """Find the row with the largest float32 cosine to each query.

        Args:
            queries: unit length, (B, D).
            pair_indices: the pair of each query, whose own rows are left out, int64, (B,); None leaves none out. Where
                every filled row is the query's own, the first row is returned.

        Returns:
            Rows of the queue in float32, (B, D).

        Raises:
            ValueError: the queue is empty.
        """
        num_filled = self.count()
        if num_filled == 0:
            raise ValueError("the queue is empty: look for neighbors only when num_filled > 0")
        rows, row_pairs = self.rows[:num_filled], self.pair_indices[:num_filled]
        queries = queries.detach().float()
        if pair_indices is not None:
            pair_indices = torch.where(pair_indices == UNKNOWN, _NOBODY, pair_indices)
        is_screened = self._is_screened(queries.device)  # asks autocast, which is off from here on
        with torch.autocast(queries.device.type, enabled=False), _whole_float32():
            if is_screened:
                half_rows = self._rows_in_half_precision()[:num_filled]
                return self.rows[_find_screened(queries, rows, half_rows, pair_indices, row_pairs)]
            return self.rows[_find_exactly(queries, rows, pair_indices, row_pairs)]

    def _rows_in_half_precision(self) -> Tensor:
        """Return a float16 copy of all rows, made at the first search and kept up to date by `push`."""
        if self._half_rows is None or self._half_rows.device != self.rows.device:
            self._half_rows = self.rows.half()
        return self._half_rows

    def _is_screened(self, device: torch.device) -> bool:
        """Return whether half precision is faster here and allowed."""
        return not self.exact and device.type == "cuda" and torch.is_autocast_enabled(device.type)

    @torch.no_grad()
    def push(self, features: Tensor, pair_indices: Tensor, is_good: Tensor) -> None:
        """Overwrite the oldest rows, without waiting for the device.

        Args:
            features: unit length, (B, D); of more than the queue holds, the last are kept.
            pair_indices: the pair each feature belongs to, int64, (B,).
            is_good: False leaves the queue exactly as it was, whatever the features are; bool, on the device, ().
        """
        size = len(self.rows)
        features, pair_indices = features.detach().to(self.rows.dtype)[-size:], pair_indices[-size:]
        candidates = (self.next_row + torch.arange(len(features), device=self.rows.device)) % size
        self.rows[candidates] = torch.where(is_good, features, self.rows[candidates])
        self.pair_indices[candidates] = torch.where(is_good, pair_indices, self.pair_indices[candidates])
        if self._half_rows is not None:
            self._half_rows[candidates] = self.rows[candidates].half()
        num_new = len(features) * is_good.to(torch.int64)
        self.next_row.copy_((self.next_row + num_new) % size)
        self.num_filled.copy_((self.num_filled + num_new).clamp_max(size))


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Keep a GPU from rounding factors to TF32, whose 10 bits confuse neighbors 1e-3 apart."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _block_rows(num_queries: int, device: torch.device) -> int:
    """Return how many rows to compare at once: what a CPU caches, or a GPU has room for."""
    if device.type == "cpu":
        return _BLOCK_ROWS
    return max(_BLOCK_ROWS, _MAX_SCORES // max(1, num_queries) // _GROUP_ROWS * _GROUP_ROWS)


def _mask_own(scores: Tensor, pair_indices: Tensor | None, row_pairs: Tensor) -> Tensor:
    """Give rows of a query's own pair the score -inf.

    Args:
        scores: changed in place, (B, R).
        pair_indices: the pair of each query, (B,); None leaves none out.
        row_pairs: the pair of each row, (R,), or of each candidate, (B, R).

    Returns:
        The scores, (B, R).
    """
    return scores if pair_indices is None else scores.masked_fill_(row_pairs == pair_indices[:, None], float("-inf"))


def _find_exactly(queries: Tensor, rows: Tensor, pair_indices: Tensor | None, row_pairs: Tensor) -> Tensor:
    """Find the row of the largest product in float32, the first of equals.

    Args:
        queries: (B, D).
        rows: (R, D).
        pair_indices: the pair of each query, (B,), or None.
        row_pairs: the pair of each row, (R,).

    Returns:
        Positions in `rows`, 0 where all are left out, int64, (B,).
    """
    best = torch.full((len(queries),), float("-inf"), device=queries.device)
    best_row = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    size = _block_rows(len(queries), queries.device)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        score, row = _mask_own(queries @ rows[block].T, pair_indices, row_pairs[block]).max(1)
        is_better = score > best
        best = torch.where(is_better, score, best)
        best_row = torch.where(is_better, row + start, best_row)
    return best_row


def _find_screened(
    queries: Tensor, rows: Tensor, half_rows: Tensor, pair_indices: Tensor | None, row_pairs: Tensor
) -> Tensor:
    """Do the same as `_find_exactly`, with few float32 products.

    All rows are scored in float16. The best groups of neighboring rows are scored again in float32. If the best
    group left behind may hold a better row, for all that float16 can tell, that query is searched exactly.

    Args:
        queries: (B, D).
        rows: (R, D).
        half_rows: the same in float16, (R, D).
        pair_indices: the pair of each query, (B,), or None.
        row_pairs: the pair of each row, (R,).

    Returns:
        Positions in `rows`, 0 where all are left out, int64, (B,).
    """
    maxima = []
    half = queries.half()
    size = _block_rows(len(queries), queries.device)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        scores = _mask_own(half @ half_rows[block].T, pair_indices, row_pairs[block])
        scores = F.pad(scores, (0, -scores.shape[1] % _GROUP_ROWS), value=float("-inf"))
        maxima.append(scores.unflatten(1, (-1, _GROUP_ROWS)).amax(2))
    screened = torch.cat(maxima, dim=1)  # (B, groups)
    top = screened.topk(min(_NUM_GROUPS + 1, screened.shape[1]), dim=1)
    groups = top.indices[:, :_NUM_GROUPS].sort(1).values
    candidates = groups[:, :, None] * _GROUP_ROWS + torch.arange(_GROUP_ROWS, device=rows.device)
    candidates = candidates.clamp_max(len(rows) - 1)  # (B, K, group rows)
    scores = torch.cat([(rows[candidate] @ queries[:, :, None])[:, :, 0] for candidate in candidates.unbind(1)], dim=1)
    candidates = candidates.flatten(1)  # (B, K · group rows)
    best, candidate = _mask_own(scores, pair_indices, row_pairs[candidates]).max(1)
    found = candidates.gather(1, candidate[:, None])[:, 0]
    if top.values.shape[1] > _NUM_GROUPS:
        doubtful = (top.values[:, -1].float() + _HALF_ERROR >= best).nonzero()[:, 0]  # waits for the device
        if len(doubtful):
            own = None if pair_indices is None else pair_indices[doubtful]
            found[doubtful] = _find_exactly(queries[doubtful], rows, own, row_pairs)
    return found
