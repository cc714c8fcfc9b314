"""What each of two processes does in test_processes.py."""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from declip_cli.errors import TrainError
from declip_cli.gradient_average import GradientAverage
from declip_cli.methods.registry import METHODS
from declip_cli.model.batch_norm import FullBatchNorm, use_full_batch_norm
from declip_cli.process_group import joined
from declip_cli.train.grad_cache import forward_backward
from tests.golden_files import golden_batch, golden_method, load_golden
from tests.methods.small_methods import batch_of, build


def step(name, *, rank, num_ranks, micro_batch_size=0, **options):
    """Take one forward and backward pass on this rank's share of a recording, or of 8 pairs for a small method."""
    if name in METHODS:
        method = build(name, queue_start="random", **options)
        batch = batch_of(method, 8).split(8 // num_ranks)[rank]
        if method.word_head is not None:  # as after earlier steps
            method.word_head.num_captions.fill_(50)
            method.word_head.num_with.copy_(torch.arange(len(method.word_head.num_with)) % 50)
    else:
        golden = load_golden(name)
        method, batch = golden_method(golden, **options), golden_batch(golden, rank, num_ranks)
    if num_ranks > 1 and method.config.batch_norm == "global":
        use_full_batch_norm(method, is_accelerator=False)
    result = forward_backward(
        method,
        batch,
        micro_batch_size=micro_batch_size,
        autocast=nullcontext,
        last_backward=GradientAverage(method.parameters()).last_backward,
    )
    terms = torch.stack([*result.terms.terms.values(), result.terms.total])
    if num_ranks > 1:
        dist.all_reduce(terms)
        terms /= num_ranks
    method.update_queue(result.embeddings, torch.tensor(True))
    found = {f"grad/{k}": p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
    found |= {f"term/{k}": v for k, v in zip([*result.terms.terms, "total"], terms, strict=True)}
    if method.word_head is not None:
        found["num_with"] = method.word_head.num_with.clone()
    if hasattr(method, "queue"):
        found["queue"], found["queue_pairs"] = method.queue.rows.clone(), method.queue.pair_indices.clone()
    return found


def run(jobs, folder):
    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    for number, (name, options) in enumerate(jobs):
        found = step(name, rank=rank, num_ranks=num_ranks, **options)
        torch.save(found, f"{folder}/{number}-{rank}.pt")
    found = batch_norm_step(FullBatchNorm(torch.nn.BatchNorm2d(3)), slice(3 * rank, 3 * rank + 3))
    torch.save(found, f"{folder}/batch_norm-{rank}.pt")


def batch_norm_step(norm, rows):
    """Normalize some rows of a fixed batch, (6, 3, 4, 5), and pull the sum of cubes back."""
    inputs = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))[rows].requires_grad_()
    out = norm(inputs)
    out.pow(3).sum().backward()
    return {
        "out": out.detach(),
        "input": inputs.grad,
        "weight": norm.weight.grad,
        "mean": norm.running_mean.clone(),
        "var": norm.running_var.clone(),
    }


def fail_on_rank_one(log):
    def tell(message):
        with open(log, "a") as file:
            file.write(f"{message}\n")

    with joined(has_gpu=False, log=tell):
        if os.environ["RANK"] == "1":
            raise TrainError("the second process cannot go on", remedy="mend it")
        dist.barrier()


def wait_for_the_end(folder):
    """Say that this rank waits, until it is asked to stop; rank 0 returns what asked it."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (Path(folder) / os.environ["RANK"]).touch()
    while not asked:
        time.sleep(0.02)
    return asked[0]
