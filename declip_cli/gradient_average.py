"""Gradients averaged over the ranks in few large messages, sent while backward still computes the others."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from declip_cli.distributed import TIMEOUT, LaggedMaximum, world_size

BUCKET_BYTES = 25 * 2**20
"""Least size of a message but for the last ones: large enough for full bandwidth, small enough to start early."""
ALIGNMENT = 4
"""Elements that every gradient is padded to within a message, so that kernels can read 16 bytes at once."""


class GradientAverage:
    """Replaces the gradients of a step by their means over the ranks.

    After the first step the ranks agree on the order in which gradients come, on which are there at the end only
    (heads outside the last of several micro-batches), and on which parameters have none on any rank: those keep none.
    From then on each bucket is sent as soon as it is complete, in this order on every rank, and no step waits for
    anything that the host has to read. A gradient missing on this rank counts as zero. Where a parameter left out at
    first has a gradient later, on any rank, the ranks agree again; its gradients count from the second next step on.

    Messages have a process group of their own, since other collectives of backward may come in between.

    Args:
        parameters: in the same order on every rank; those that are not trained are left out.
        bucket_bytes: least size of a message.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []  # empty: to be agreed on
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._arrived: dict[nn.Parameter, None] = {}  # in order
        self._num_sent = 0
        self._is_last_backward = False
        if world_size() > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(timeout=TIMEOUT))
            self._num_left_out = LaggedMaximum()
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._arrive)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Average while the last backward pass of a step runs inside the block; gradients of earlier passes count."""
        if world_size() == 1:
            yield
            return
        self._arrived, self._num_sent, self._is_last_backward = {}, 0, True
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)
        try:
            yield
        finally:
            self._is_last_backward = False
        if not self._buckets:
            self._agree()
        for bucket in self._buckets[self._num_sent :]:
            bucket.send(self._group)
        for bucket in self._buckets:
            bucket.finish()
        left_out = [p for p in self._parameters if p.grad is not None and p not in self._bucket_of]
        for parameter in left_out:  # the other ranks do not know of it yet
            parameter.grad = None
        if self._num_left_out.exchange([len(left_out)])[0]:
            self._buckets = []

    def _arrive(self, parameter: Tensor) -> None:
        """Send what is complete now; called when a backward pass has added all to a parameter's gradient."""
        if not self._is_last_backward or parameter in self._arrived:
            return
        self._arrived[parameter] = None  # type: ignore[index]
        bucket = self._bucket_of.get(parameter)  # type: ignore[call-overload]
        if not self._buckets or bucket is None:
            return
        bucket.num_missing -= 1
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].num_missing == 0:
            self._buckets[self._num_sent].send(self._group)
            self._num_sent += 1

    def _agree(self) -> None:
        """Make the buckets: first what has arrived on every rank, as on rank 0, then what else has a gradient."""
        parameters, positions = self._parameters, {p: position for position, p in enumerate(self._arrived)}
        found = torch.tensor([[p in positions, p.grad is not None] for p in parameters], dtype=torch.int32)
        order = torch.tensor([positions.get(p, -1) for p in parameters])
        dist.all_reduce(found)  # on the CPU, as is the order
        dist.broadcast(order, src=0)
        num_arrived, num_there = found.unbind(1)
        numbers = order.argsort(stable=True).tolist()
        early = [parameters[n] for n in numbers if num_arrived[n] == world_size()]
        late = [parameters[n] for n in numbers if num_there[n] > 0 and num_arrived[n] < world_size()]
        self._buckets = [_Bucket(group) for part in (early, late) for group in _groups(part, self._bucket_bytes)]
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._num_left_out.restart()


class _Bucket:
    """Gradients sent as one message; once sent, they are views of its memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.num_missing = 0
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        # Strides as the weights have them (convolutions may have channels last): fused optimizers rely on it.
        self._parts = [
            part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, self._flat.split(sizes), strict=True)
        ]
        self._work: dist.Work | None = None

    def send(self, group: dist.ProcessGroup) -> None:
        with torch.no_grad():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            torch._foreach_copy_(self._parts, gradients)
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            parameter.grad = part if parameter.requires_grad else None
        op = dist.ReduceOp.AVG if self._flat.is_cuda else dist.ReduceOp.SUM  # gloo has learnt AVG lately only
        self._work = dist.all_reduce(self._flat, op=op, group=group, async_op=True)

    def finish(self) -> None:
        """Let what follows on this device wait for the message; on a GPU the host does not."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if not self._flat.is_cuda:
            self._flat /= world_size()


def _groups(parameters: Sequence[nn.Parameter], least_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Divide parameters, in their order, into groups of one number format and at least so many bytes."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and (parameter.dtype != group[0].dtype or sum(p.nbytes for p in group) >= least_bytes):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group
