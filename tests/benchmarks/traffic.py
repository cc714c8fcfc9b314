"""What ranks exchange in a step, as a formula, and what share of the step it takes on named networks.

`python -m tests.benchmarks.traffic` prints the table of docs/many-machines.md: ViT-B/32, 128 pairs on each GPU. Nothing
is measured: bytes follow from the methods (tests/test_gradient_average.py counts them), times from the rates below.
"""

import argparse
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from declip_cli.batch import Batch
from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.gradient_average import ALIGNMENT
from declip_cli.methods.base import Method
from declip_cli.methods.registry import METHODS, build_method
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.train.grad_cache import forward_backward
from tests.benchmarks.made_up_batches import make_batch

GPU_FLOPS = 0.4 * 989e12
"""What a step is taken to reach of an H100's peak in bfloat16."""
BYTES_S = {"NVLink": 370e9, "InfiniBand 8 × 400 Gb/s": 350e9, "Ethernet 100 Gb/s": 11e9}
"""Of a ring: inside a machine of 8 GPUs; between machines, whose links all carry a share of each message."""
GPUS_OF_A_MACHINE = 8
"""NVLink ends there."""
FLOAT, NUMBER = 4, 8
SMALL_MESSAGES = {"decisions": 3 * NUMBER, "parameters left out": NUMBER}


def floats_of_a_pair(method: Method, *, token_dim: int = TOKEN_WISE_DIM, simclr_dim: int = 256) -> tuple[int, int]:
    """Count the numbers of a pair that every rank gets: those with a gradient, those without (8 bytes count as 2)."""
    config, views, dim = method.config, method.views, method.encoder.architecture.embed_dim
    num_images = {"slip": 1, "rocket": 1, "aclip": 2}.get(config.name, len(views.images))  # others are not projected
    num_texts = 1 if config.name == "rocket" else len(views.texts)
    with_gradient, without = 0, 0
    if method.is_active("clip") or method.is_active("nn"):
        with_gradient += (num_images + num_texts) * dim  # each embedding once, whoever uses it
    if method.is_active("nn"):
        without += len(views.texts) * dim + 2  # the neighbors; the pair's number in the data set
    if config.positives == "caption":
        without += 2 * config.captions
    if method.is_active("simclr"):
        with_gradient += 2 * simclr_dim
    if method.is_active("strong"):
        with_gradient += (2 + 2) * simclr_dim  # the heads' results for two images and two texts
    if method.is_active("filip"):
        with_gradient += 2 * config.token_wise_top_k * token_dim  # of the image and of the text
    return with_gradient, without


def step_traffic(
    method: Method, num_pairs: int, num_ranks: int, norms: tuple[nn.Module, ...] = (), **dims: int
) -> dict[str, int]:
    """Count the bytes of a step on each rank: the whole tensor for each kind of collective.

    Args:
        method: its parameters have the gradients of a step.
        num_pairs: on each rank, B.
        num_ranks: W.
        norms: BatchNorms over all ranks, each of which sees two views.
        dims: of the heads, where they are not the usual ones; as of `floats_of_a_pair`.

    Returns:
        `all_gather` (what comes out), `reduce_scatter` (what goes in), `all_reduce`.
    """
    with_gradient, without = floats_of_a_pair(method, **dims)
    total = num_pairs * num_ranks
    reduced = FLOAT * sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in method.parameters() if p.grad is not None)
    reduced += FLOAT * method.is_active("mlm")  # masked tokens
    # In forward the sum and the count, then the squares; in backward the gradients of both. A teacher's norm sees one
    # view and has no backward.
    times = {True: 4, False: 1}
    reduced += sum(times[norm.weight.requires_grad] * FLOAT * (2 * norm.weight.numel() + 1) for norm in norms)
    return {
        "all_gather": FLOAT * total * (with_gradient + without),
        "reduce_scatter": FLOAT * total * with_gradient,
        "all_reduce": reduced + sum(SMALL_MESSAGES.values()),
    }


def sent_bytes(traffic: dict[str, int], num_ranks: int) -> tuple[float, float]:
    """Return what each rank sends in rings: gathers and their gradients; averages of the weights' gradients."""
    share = (num_ranks - 1) / num_ranks
    return share * (traffic["all_gather"] + traffic["reduce_scatter"]), share * 2 * traffic["all_reduce"]


def method_after_a_step(name: str) -> tuple[Method, float]:
    """Build a ViT-B/32 with gradients, and count the operations of one of its pairs."""
    method = build_method(ModelConfig(arch="vit-b32"), MethodConfig(name=name, queue_size=8))
    options = argparse.Namespace(batch_size=2, captions="normal", ungrouped=True)
    batch: Batch = make_batch(method, options, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        forward_backward(method, batch, micro_batch_size=0, autocast=nullcontext)
    return method, counter.get_total_flops() / len(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=128, help="on each GPU")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--method", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    options = parser.parse_args()
    print(f"| method | GPUs | gathers, MB | gradients, MB | {' | '.join(BYTES_S)} |")
    print("|" + " --- |" * (4 + len(BYTES_S)))
    for name in options.method:
        method, flops = method_after_a_step(name)
        step_s = options.pairs * flops / GPU_FLOPS
        for num_ranks in options.ranks:
            sent = sent_bytes(step_traffic(method, options.pairs, num_ranks), num_ranks)
            shares = [" + ".join(f"{size / speed / step_s:.2f}" for size in sent) for speed in BYTES_S.values()]
            if num_ranks > GPUS_OF_A_MACHINE:
                shares[0] = ""
            print(f"| {name} | {num_ranks:,} | {sent[0] / 1e6:,.0f} | {sent[1] / 1e6:,.0f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
