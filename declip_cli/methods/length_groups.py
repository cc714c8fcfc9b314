"""Encode the texts of a batch in groups of similar length, so that little padding is computed."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.batch import TextGroups

MAX_GROUPS = 4
_CALL_TOKENS = {"cpu": 128}
_CALL_TOKENS_ON_A_GPU = 4096
"""On a GPU, a call is the launch of all its kernels."""


def group_texts(lengths: Tensor, *, call_tokens: int) -> TextGroups:
    """Put texts of similar length into groups so that the fewest tokens are encoded.

    Args:
        lengths: tokens of each text without padding, int64, on the CPU, (N,).
        call_tokens: what each group costs beside its tokens.

    Returns:
        The groups, on the CPU.
    """
    bounds = group_bounds(lengths, call_tokens=call_tokens)
    group = torch.bucketize(lengths, torch.tensor(bounds))  # (N,)
    order = group.argsort(stable=True)
    sizes = group.bincount(minlength=len(bounds)).tolist()
    return TextGroups(order=order, positions=order.argsort(), shapes=tuple(zip(sizes, bounds, strict=True)))


def call_tokens(device: torch.device) -> int:
    """Return what one more call of the text tower costs on a device, in tokens that could be encoded instead."""
    return _CALL_TOKENS.get(device.type, _CALL_TOKENS_ON_A_GPU)


def encode_in_groups(tower: Callable[[Tensor], Tensor], embedded: Tensor, groups: TextGroups) -> Tensor:
    """Encode texts with a causal tower, each group by itself.

    Tokens of a text do not see what is behind them, so states, losses and gradients are the same up to rounding. The
    tokens are looked up before, once: each lookup costs a gradient as large as the vocabulary.

    Args:
        tower: embedded tokens → states, (N, L, E) each, of which each depends on its own and earlier tokens only.
        embedded: tokens looked up, (N, L, E).
        groups: of the same texts, on the same device.

    Returns:
        State of each token, (N, L, E); padding has states of no meaning.
    """
    longest = embedded.shape[1]
    if groups.shapes == ((len(embedded), longest),):
        return tower(embedded)
    pieces = embedded.index_select(0, groups.order).split([num for num, _ in groups.shapes])
    parts = []
    for (_, length), texts in zip(groups.shapes, pieces, strict=True):
        parts.append(F.pad(tower(texts[:, :length]), (0, 0, 0, longest - length)))  # (n, L, E)
    return torch.cat(parts).index_select(0, groups.positions)


def group_bounds(lengths: Tensor, *, call_tokens: int) -> list[int]:
    """Choose the longest text of each group so that the fewest tokens are encoded.

    Args:
        lengths: tokens of each text without padding, int64, on the CPU, (N,).
        call_tokens: what each group costs beside its tokens.

    Returns:
        At most `MAX_GROUPS` lengths, ascending, the last that of the longest text; each group holds the texts above
        the bound before, up to its own.
    """
    num_within = np.cumsum(np.bincount(lengths.numpy()))  # (L + 1,)
    longest = len(num_within) - 1
    sides = np.arange(longest + 1)
    num_between = num_within - num_within[:, None]  # (L + 1, L + 1): longer than the row's, up to the column's
    cost = np.where(sides > sides[:, None], num_between * sides + call_tokens, np.inf)
    least = np.where(sides == 0, 0.0, np.inf)  # (L + 1,): of all texts up to a length, in so many groups
    totals, befores = [], []
    for _ in range(MAX_GROUPS):
        options = least[:, None] + cost  # (L + 1, L + 1)
        befores.append(options.argmin(0))
        least = options.min(0)
        totals.append(least[longest])
    bounds = [longest]
    for before in reversed(befores[1 : int(np.argmin(totals)) + 1]):
        bounds.insert(0, int(before[bounds[0]]))
    return bounds
