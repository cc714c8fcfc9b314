"""Items encoded by several ranks: each takes a share, and every rank ends with the rows of all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.distributed import rank, world_size
from declip_cli.evaluate.image_pipeline import FeatureOptions, Progress

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """What became of some items."""

    rows: Tensor
    """float32 on the CPU, (R, …); an item has one row, several or none."""
    numbers: Tensor
    """The item of each row, ascending, int64, (R,)."""
    causes: dict[int, str] = field(default_factory=dict)
    """Why an item has no row, by its number, ascending."""


def encode_shares(num_items: int, encode: Callable[[range, FeatureOptions], Part], options: FeatureOptions) -> Part:
    """Encode items on this process alone or, where `options.split_over_ranks` says so, a share on each rank.

    Ranks meet once, after each has encoded its share. An error of `encode` is raised on its rank only, so errors
    that depend on the items belong behind this call, where every rank knows the same.

    Args:
        num_items: N, the same on every rank.
        encode: from the numbers of the items to encode, in [0, N), and the options for them; not called for an
            empty share.
        options: the caller's; progress is told on rank 0, for the ranks together.

    Returns:
        The rows of all N items on every rank.
    """
    if options.num_shares == 1:
        return encode(range(num_items), options)
    own = range(rank(), num_items, world_size())
    progress = _of_all(options.progress, num_items) if options.progress and rank() == 0 else None
    part = encode(own, replace(options, progress=progress)) if own else _EMPTY
    return _gather(part)


def take(items: Sequence[T], own: range) -> Sequence[T]:
    """Return the items of a share."""
    return items[own.start : own.stop : own.step]


_EMPTY = Part(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))


def _of_all(progress: Progress, num_items: int) -> Progress:
    """Tell the progress of one rank, the one with the largest share, as that of all."""
    return lambda num_done, _: progress(min(num_done * world_size(), num_items), num_items)


def _gather(part: Part) -> Part:
    """Put the parts of all ranks together, in the order of their items."""
    notes: list[Any] = [None] * world_size()
    dist.all_gather_object(notes, (tuple(part.rows.shape), part.numbers, part.causes))
    causes = dict(sorted(item for _, _, causes in notes for item in causes.items()))
    order = torch.cat([numbers for _, numbers, _ in notes])
    if not len(order):
        return Part(_EMPTY.rows, _EMPTY.numbers, causes)
    numbers, origins = order.sort(stable=True)
    places = origins.argsort().split([len(numbers) for _, numbers, _ in notes])
    parts = _gather_rows(part.rows, [torch.Size(shape) for shape, _, _ in notes])
    whole = torch.empty(len(order), *next(rows.shape[1:] for rows in parts if len(rows)))  # (R, …)
    for place, rows in zip(places, parts, strict=True):
        if len(rows):
            whole[place] = rows
    return Part(whole, numbers, causes)


def _gather_rows(rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Exchange tensors of different sizes, padded to the largest: gloo wants equal ones."""
    longest = max(shape.numel() for shape in shapes)
    padded = torch.zeros(longest)
    padded[: rows.numel()] = rows.flatten()
    parts = [torch.empty(longest) for _ in shapes]
    dist.all_gather(parts, padded)
    return [flat[: shape.numel()].view(shape) for flat, shape in zip(parts, shapes, strict=True)]
