"""Ranks, and sums over ranks with their gradients: the same code for one process and for many.

Every rank minimizes its own loss over its rows of the full batch, and `gradient_average` takes the mean over the
ranks. Backward of a gather or a sum over ranks therefore adds the gradients of all ranks: what each rank ends with
is the gradient of the mean of all ranks' losses, which is the full-batch gradient (open_clip issues 616 and 894).
torch.distributed.nn.functional has the same gather and sum, deprecated in favor of functions without a public name.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, to start and in every collective."""
# Before torch 2.14 they have other names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def world_size() -> int:
    """Return the number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ANN401  (autograd's own type is untyped)
        gathered = local.new_empty(world_size() * len(local), *local.shape[1:])
        _all_gather(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ANN401
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())
        return own


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ANN401
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ANN401
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def gather(local: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks along its first dimension, with gradient: (B, …) → (M, …), rank 0 first."""
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return gathered


class Gathered:
    """Rows of this rank, and those of all ranks, which are gathered when they are first asked for, and once only.

    Args:
        own: (B, …).
        find_all: makes those of all ranks where they need not be gathered.
    """

    def __init__(self, own: Tensor, find_all: Callable[[], Tensor] | None = None) -> None:
        self.own = own
        self._find_all = find_all or partial(gather, own)

    @cached_property
    def all(self) -> Tensor:
        """With gradient, rank 0 first, (M, …); every rank asks for it, or none."""
        return self._find_all()

    def first(self, num_views: int) -> "Gathered":
        """Keep the first views only, (B, V, …)."""
        return Gathered(self.own[:, :num_views], lambda: self.all[:, :num_views])

    def detached(self) -> "Gathered":
        """Detach from the graph, and keep what is gathered."""
        return Gathered(self.own.detach(), self.all.detach if "all" in vars(self) else None)


def sum_over_ranks(local: Tensor) -> Tensor:
    """Add a tensor, of the same shape on every rank, up over all ranks, with gradient."""
    if world_size() == 1:
        return local
    total: Tensor = _Sum.apply(local)  # type: ignore[no-untyped-call]
    return total


def rows_of_rank(num_local: int, device: torch.device) -> Tensor:
    """Number this rank's rows within the gathered batch: rank · B + [0, …, B − 1], int64, (B,)."""
    return torch.arange(num_local, device=device) + rank() * num_local


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in the same order on every rank, with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


class LaggedMaximum:
    """The largest of all ranks' whole numbers, one call late: the message travels while the ranks work.

    Ranks are at the same call at the same time, so what they get is the same on all. The first call, and the first
    after `restart`, waits for its own numbers, which the next one gets once more.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def exchange(self, values: Sequence[int]) -> list[int]:
        """Give this rank's numbers and get the maxima of the call before."""
        if world_size() == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)  # on the CPU: no device waits
        pending = (numbers, dist.all_reduce(numbers, op=dist.ReduceOp.MAX, async_op=True))
        found, work = self._pending or pending
        if work is not None:
            work.wait()
        self._pending = pending
        return found.tolist()

    def restart(self) -> None:
        """Forget what was given, on every rank alike: something has been done about it."""
        self._pending = None
