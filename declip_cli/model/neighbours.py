"""The queue of recent text features in which nearest neighbours are found."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_ROWS = 8192
"""Rows compared at once: with `max` per block 16 to 39 times as fast as one product and a top-k."""
UNKNOWN = -1
"""Number of a row that belongs to no pair."""


class NeighbourQueue(nn.Module):
    """First-in, first-out rows of unit length, saved with the model's training state.

    Args:
        num_rows: queue size.
        dim: width of a row, D.

    Source: NNCLR, arXiv 2104.14548; DeCLIP, arXiv 2110.05208, section 3.4. The original's queue lies on the
    CPU, is not saved, may return its random initial rows and drops what does not fit at the wrap; this one does not.
    """

    rows: Tensor
    """(queue size, D), unit length where filled."""
    numbers: Tensor
    """The pair each row belongs to, `UNKNOWN` if none, int64, (queue size,)."""
    next_row: Tensor
    """Where the next feature goes, int64, ()."""
    num_filled: Tensor
    """Rows that hold a feature, int64, ()."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_rows, dim))
        self.register_buffer("numbers", torch.full((num_rows,), UNKNOWN, dtype=torch.int64))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_filled", torch.zeros((), dtype=torch.int64))
        self._was_full = False

    def count(self) -> int:
        """Return the number of rows that hold a feature; waits for the device only until all of them do."""
        if not self._was_full:
            num_filled = int(self.num_filled)
            self._was_full = num_filled == len(self.rows)
            return num_filled
        return len(self.rows)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        self._was_full = False
        super()._load_from_state_dict(*arguments, **options)

    def fill_randomly(self) -> None:
        """Start with random directions that count as features, as the original does."""
        self.rows.copy_(F.normalize(torch.randn_like(self.rows), dim=1))
        self.num_filled.fill_(len(self.rows))

    @torch.no_grad()
    def nearest(self, queries: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Find the row most similar to each query.

        Args:
            queries: unit length, (B, D).
            numbers: the pair of each query, whose own rows are left out, int64, (B,); None leaves none out. Where
                every filled row is the query's own, the first row is returned.

        Returns:
            Rows of the queue in float32, (B, D).

        Raises:
            ValueError: the queue is empty.
        """
        num_filled = self.count()
        if num_filled == 0:
            raise ValueError("the queue is empty: look for neighbours only when num_filled > 0")
        queries = queries.detach().float()
        best = torch.full((len(queries),), float("-inf"), device=queries.device)
        best_row = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, num_filled, _BLOCK_ROWS):
                block = slice(start, min(start + _BLOCK_ROWS, num_filled))
                scores = queries @ self.rows[block].T  # (B, block)
                if numbers is not None:
                    is_own = (self.numbers[block] == numbers[:, None]) & (numbers[:, None] != UNKNOWN)
                    scores = scores.masked_fill(is_own, float("-inf"))
                score, row = scores.max(1)
                is_better = score > best
                best = torch.where(is_better, score, best)
                best_row = torch.where(is_better, row + start, best_row)
        return self.rows[best_row]

    @torch.no_grad()
    def push(self, features: Tensor, numbers: Tensor, is_good: Tensor) -> None:
        """Overwrite the oldest rows, without waiting for the device.

        Args:
            features: unit length, (B, D); of more than the queue holds, the last are kept.
            numbers: the pair each feature belongs to, int64, (B,).
            is_good: False leaves the queue exactly as it was, whatever the features are; bool, on the device, ().
        """
        size = len(self.rows)
        features, numbers = features.detach().to(self.rows.dtype)[-size:], numbers[-size:]
        places = (self.next_row + torch.arange(len(features), device=self.rows.device)) % size
        self.rows[places] = torch.where(is_good, features, self.rows[places])
        self.numbers[places] = torch.where(is_good, numbers, self.numbers[places])
        num_new = len(features) * is_good.to(torch.int64)
        self.next_row.copy_((self.next_row + num_new) % size)
        self.num_filled.copy_((self.num_filled + num_new).clamp_max(size))
