"""What each of four processes does in test_gradient_average.py."""

import os
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from declip_cli import distributed
from declip_cli.distributed import LaggedMaximum, gather
from declip_cli.gradient_average import GradientAverage
from declip_cli.methods.registry import METHODS
from declip_cli.model.batch_norm import use_full_batch_norm
from declip_cli.train.grad_cache import forward_backward
from declip_cli.train.loop import _decide
from declip_cli.train.optim import schedule_of
from tests.methods.small_methods import GOOD, batch_of, build
from tests.train.small_runs import resolved, small_config

NUM_RANKS = 4
NUM_STEPS = 6
NUMBERS = [[3, 0], [1, 7], [9, 2], [4, 4]]
"""What each rank gives away first, for the maximum over ranks."""


class Uneven(nn.Module):
    """Parameters that have a gradient now and then, on some ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 2).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(6, 5)
        self.head = nn.Parameter(torch.randn(3))  # in the first of two passes only
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.sometimes = nn.Parameter(torch.randn(7))  # not on rank 1 in step 1
        self.late = nn.Parameter(torch.randn(2, 2))  # on rank 2 from step 2 on
        self.other_format = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def losses(self, step, rank):
        """Compute the losses of the two passes of a step."""
        generator = torch.Generator().manual_seed(10 * step + rank)
        images = torch.randn(2, 3, 3, 3, generator=generator)
        features = self.linear(self.conv(images).mean((2, 3))).square().sum() * (1 + self.other_format.sum().float())
        if (rank, step) != (1, 1):
            features = features + (self.sometimes * images.sum()).sin().sum()
        if rank == 2 and step >= 2:
            features = features + self.late.exp().sum()
        return (self.head * (rank + step)).exp().sum() + self.linear(torch.ones(6)).sum(), features

    def gradients(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}


@contextmanager
def recorded():
    """Record every collective of this process: its name, its bytes in full, whether it may go on without waiting."""
    calls = []

    def follow(name, function, largest):
        def call(*args, **kwargs):
            calls.append((name, args[largest].nbytes, kwargs.get("async_op", False)))
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(dist, "all_reduce", follow("all_reduce", dist.all_reduce, 0)),
        mock.patch.object(dist, "broadcast", follow("broadcast", dist.broadcast, 0)),
        mock.patch.object(distributed, "_all_gather", follow("all_gather", distributed._all_gather, 0)),
        mock.patch.object(distributed, "_reduce_scatter", follow("reduce_scatter", distributed._reduce_scatter, 1)),
    ):
        yield calls


def average(rank, bucket_bytes):
    """Take steps of two passes, → averages of each step, calls before and after the end of its last pass."""
    model, steps = Uneven(), []
    averaged = GradientAverage(model.parameters(), bucket_bytes=bucket_bytes)
    for step in range(NUM_STEPS):
        model.zero_grad(set_to_none=True)
        first, second = model.losses(step, rank)
        first.backward()
        with recorded() as calls, averaged.last_backward():
            second.backward()
            num_during = len(calls)
        are_laid_out = all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
        steps.append((model.gradients(), calls[:num_during], calls[num_during:], are_laid_out))
    return steps


def gathered(rank):
    """Gather two rows of each rank, transposed in memory, and pull a different weight back on each."""
    rows = (torch.arange(6.0).view(3, 2).T + 10 * rank).requires_grad_()
    everything = gather(rows)
    (everything * everything * (rank + 1)).sum().backward()
    return everything.detach(), rows.grad, gather(torch.tensor([rank], dtype=torch.uint8))


def lagged(rank):
    """Give numbers away four times, and forget them once in between."""
    maximum, found = LaggedMaximum(), []
    for call in range(4):
        if call == 3:
            maximum.restart()
        found.append(maximum.exchange([number + 10 * call for number in NUMBERS[rank]]))
    return found


def decisions(rank):
    """Decide after each of 7 steps: rank 3 wants to save after 2, rank 1 to stop from 5 on, rank 0's clock is ahead."""
    run = resolved(small_config(train={"time_limit_s": 100.0, "checkpoint_every_steps": 7, "steps": 999}))
    facts = {"schedule": schedule_of(run), "startup_seconds": 0.0, "samples_seen": 0, "num_rollbacks": 0}
    agreed, found = LaggedMaximum(), []
    for step in range(1, 8):
        decision = _decide(
            SimpleNamespace(run=run, config=run.config, step=step, **facts),
            SimpleNamespace(seconds=lambda: step * (10.0 if rank == 0 else 1.0)),  # noqa: B023
            SimpleNamespace(is_due=lambda: (rank, step) == (3, 2)),  # noqa: B023
            agreed,
            wants_stop=rank == 1 and step >= 5,
        )
        if decision.must_save:
            agreed.restart()
        found.append((decision.must_stop, decision.must_save, decision.share))
    return found


def exchanged(name, rank, *, micro_batch_size=0):
    """Take two steps of two pairs a rank, and count what the second exchanges, → bytes of each kind of collective."""
    method = build(name, queue_start="random")
    use_full_batch_norm(method, is_accelerator=False)
    batch, agreed = batch_of(method, 2 * NUM_RANKS).split(2)[rank], LaggedMaximum()
    averaged = GradientAverage(method.parameters())
    for _ in range(2):
        method.zero_grad(set_to_none=True)
        with recorded() as calls:
            agreed.exchange([0, 0, 0])
            result = forward_backward(
                method,
                batch,
                micro_batch_size=micro_batch_size,
                autocast=nullcontext,
                last_backward=averaged.last_backward,
            )
            method.update_queue(result.embeddings, GOOD)
    sizes = Counter()
    for kind, num_bytes, _ in calls:
        sizes[kind] += num_bytes
    return dict(sizes)


def run(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    found = {
        "small": average(rank, bucket_bytes=1),
        "large": average(rank, bucket_bytes=2**20),
        "gathered": gathered(rank),
        "lagged": lagged(rank),
        "decisions": decisions(rank),
        "traffic": {name: exchanged(name, rank) for name in METHODS},
        "traffic of micro-batches": {name: exchanged(name, rank, micro_batch_size=1) for name in METHODS},
    }
    torch.save(found, f"{folder}/{rank}.pt")
