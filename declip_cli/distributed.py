"""Ranks, and sums over ranks with their gradients: the same code for one process and for many.

Every rank minimises its own loss over its rows of the full batch, and `average_gradients` takes the mean over the
ranks. Backward of a gather or a sum over ranks therefore adds the gradients of all ranks: what each rank ends with
is the gradient of the mean of all ranks' losses, which is the full-batch gradient (open_clip issues 616 and 894).
torch.distributed.nn.functional has the same gather and sum, deprecated in favour of functions without a public name.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_ELEMENTS = 2**24


def world_size() -> int:
    """Return the number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ANN401  (autograd's own type is untyped)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ANN401
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


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


def sum_over_ranks(local: Tensor) -> Tensor:
    """Add a tensor, of the same shape on every rank, up over all ranks, with gradient."""
    if world_size() == 1:
        return local
    total: Tensor = _Sum.apply(local)  # type: ignore[no-untyped-call]
    return total


def rows_of_rank(num_local: int, device: torch.device) -> Tensor:
    """Number this rank's rows within the gathered batch: rank · B + [0, …, B − 1], int64, (B,)."""
    return torch.arange(num_local, device=device) + rank() * num_local


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in few large messages.

    Parameters come in the same order on every rank; one without gradient counts as zero where another rank has one.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    flags = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
    dist.all_reduce(flags)  # on the CPU: no device waits
    bucket: list[Tensor] = []
    num_elements = 0
    for parameter, flag in zip(trained, flags.tolist(), strict=True):
        if not flag:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        num_elements += parameter.numel()
        if num_elements >= _BUCKET_ELEMENTS:
            _average(bucket)
            bucket, num_elements = [], 0
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in the same order on every rank, with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)
