"""Batches whose tensors have few shapes, for code that is compiled for each shape it meets."""

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.batch import NO_LABEL, Batch, TextGroups
from declip_cli.methods.length_groups import call_tokens, group_texts

_LENGTH_STEP, _LENGTH_MARGIN = 8, 2
"""Lengths are multiples of the first; a new one is at least so many tokens longer than what made it necessary."""
_NUM_STEP, _NUM_MARGIN = 16, 1.25
"""The same for numbers of masked tokens, and the factor."""
FILLS_UP = -1
"""In the place of the position of a masked token: there is none."""


@dataclass(slots=True)
class _Shapes:
    """Those of batches of one number of pairs."""

    sizes: list[int]
    """Texts of each group, the shortest texts first."""
    lengths: list[int]
    """Tokens that are encoded of each text of a group."""
    num_masked: int = -1
    """Of the batch; -1 before there is one."""


class SteadyShapes:
    """Gives all batches of a run the same shapes, without waiting for a device and without changing what they say.

    How many texts are encoded together is settled by the first batch of a number of pairs. Lengths and the number of
    masked tokens are rounded up, and grow where a batch has more: seldom, and never back.

    Args:
        context_length: the longest that a text can be, L.
        is_grouped: whether texts may be encoded in groups of similar length; else all are at full length.
    """

    def __init__(self, *, context_length: int, is_grouped: bool) -> None:
        self._context_length, self._is_grouped = context_length, is_grouped
        self._length = 0
        self._by_num_pairs: dict[int, _Shapes] = {}

    def fit(self, batch: Batch) -> Batch:
        """Fill a batch up to the shapes of those before it.

        Args:
            batch: B pairs that are counted, or part of such.

        Returns:
            The same pairs: texts with padding behind, (B, T, L), positions of masked tokens followed by `FILLS_UP`,
            and groups of texts.
        """
        assert batch.text_lengths is not None  # the loader counts
        assert batch.mlm_counts is not None
        self._length = self._longer(self._length, batch.tokens.shape[-1])
        lengths, device = batch.text_lengths.flatten(), batch.tokens.device
        if len(batch) not in self._by_num_pairs:
            self._by_num_pairs[len(batch)] = self._settle(lengths, device)
        shapes = self._by_num_pairs[len(batch)]
        num_masked = int(batch.mlm_counts.numpy().sum())
        if num_masked > shapes.num_masked:
            shapes.num_masked = _round_up(num_masked * _NUM_MARGIN + 1, _NUM_STEP)
        num_new = self._length - batch.tokens.shape[-1]
        return replace(
            batch,
            tokens=F.pad(batch.tokens, (0, num_new)),
            mlm_labels=F.pad(batch.mlm_labels, (0, num_new), value=NO_LABEL),
            text_lengths=None,
            mlm_counts=None,
            mlm_positions=self._filled_up(batch, shapes.num_masked, num_new),
            text_groups=self._groups(lengths, shapes).to(device) if self._is_grouped else None,
        )

    def _settle(self, lengths: Tensor, device: torch.device) -> _Shapes:
        groups = group_texts(lengths, call_tokens=call_tokens(device)).shapes
        shapes = _Shapes(sizes=[], lengths=[])
        for size, longest in groups:
            length = self._longer(0, longest)
            if shapes.lengths[-1:] == [length]:
                shapes.sizes[-1] += size
            else:
                shapes.sizes.append(size)
                shapes.lengths.append(length)
        return shapes

    def _groups(self, lengths: Tensor, shapes: _Shapes) -> TextGroups:
        """Divide texts into groups of the settled sizes, (N,) → their order, and lengths that suffice."""
        order = lengths.argsort(stable=True)
        ends = np.fromiter(accumulate(shapes.sizes), dtype=np.int64)
        longest = lengths.numpy()[order.numpy()[ends - 1]].tolist()  # of each group
        pairs = zip(shapes.lengths[:-1], longest[:-1], strict=True)
        # The longest group is as long as what the states of all are put together to.
        shapes.lengths = [*(self._longer(*pair) for pair in pairs), self._length]
        return TextGroups(
            order=order, positions=order.argsort(), shapes=tuple(zip(shapes.sizes, shapes.lengths, strict=True))
        )

    def _longer(self, length: int, needed: int) -> int:
        """Return the length, or where more tokens are needed, a larger one."""
        return (
            length if needed <= length else min(self._context_length, _round_up(needed + _LENGTH_MARGIN, _LENGTH_STEP))
        )

    def _filled_up(self, batch: Batch, num_masked: int, num_new: int) -> Tensor:
        """Give the positions of masked tokens in texts that are longer now, (K,) → (`num_masked`,)."""
        positions = batch.mlm_positions
        assert positions is not None
        positions = positions + positions // batch.tokens.shape[-1] * num_new
        return F.pad(positions, (0, num_masked - len(positions)), value=FILLS_UP)


def _round_up(value: float, step: int) -> int:
    return int(-(-value // step) * step)
