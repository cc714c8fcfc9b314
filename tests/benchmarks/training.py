"""Training steps: samples/s and share of the peak against OpenCLIP's CLIP step, and memory of micro-batches.

On synthetic pairs, so that only the step counts; ours and OpenCLIP's in turn. `--faithful` compares DeCLIP with its
step as the original computes it (`original_step.py`). `--profile 15` prints where one step spends its time. `--memory`
measures the peak memory of a batch of 1,024 in micro-batches of 64 against a batch of 64, for every method.
"""

import argparse
import json
import statistics
import time

import open_clip
import torch
from made_up_batches import autocast, draw_lengths, make_batch
from old_ways import OLD_WAYS
from original_step import original_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from declip_cli.config import MethodConfig, ModelConfig, RunConfig, TrainConfig
from declip_cli.methods.registry import METHODS, build_method
from declip_cli.resolve import DataFacts, Machine, resolve
from declip_cli.train.compiled import compile_method
from declip_cli.train.grad_cache import forward_backward
from declip_cli.train.optim import build_optimizers, clamp_logit_scales, clip_gradients, step_where

PEERS = {"vit-b32": "ViT-B-32-quickgelu", "vit-b16": "ViT-B-16-quickgelu", "rn50": "RN50-quickgelu"}


def our_step(arch: str, method_name: str, options: argparse.Namespace, device: torch.device):
    """Build one whole training step: views to updated weights and queue."""
    train = TrainConfig(steps=1, batch_size=options.batch_size)
    asked = RunConfig(model=ModelConfig(arch=arch), method=MethodConfig(name=method_name), train=train)
    machine = Machine(
        world_size=1, device=device.type, precision=options.precision, cores=1, threads=1, workers=0
    )  # of which only the precision counts here
    data = DataFacts(num_pairs=options.batch_size, fingerprint="")
    config = resolve(asked, data=data, machine=machine).config
    method = build_method(config.model, config.method).to(device).train()
    if options.compile:
        compile_method(method, with_graphs=options.graphs)
    optimizers = build_optimizers(method, config)
    batch = make_batch(method, options, device)

    def step() -> None:
        method.before_step(0.5)
        result = forward_backward(
            method,
            batch,
            micro_batch_size=options.micro_batch_size,
            autocast=autocast(options.precision, device),
        )
        is_good = clip_gradients(method.parameters(), 1.0).isfinite()
        step_where(optimizers, is_good)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        clamp_logit_scales(method, (0.0, 4.6052))
        method.update_queue(result.embeddings, is_good)

    return step


def peer_step(arch: str, options: argparse.Namespace, device: torch.device):
    """Build OpenCLIP's CLIP step on its own model and loss; texts as long as our longest, as its newest version can."""
    model = open_clip.create_model(PEERS[arch], device=device).train()
    generator = torch.Generator().manual_seed(0)
    lengths = draw_lengths((options.batch_size,), options.captions, generator).clamp(4, 77)
    longest = int(lengths.max())
    model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:longest].detach().clone())
    model.attn_mask = model.attn_mask[:longest, :longest].contiguous()
    loss = open_clip.ClipLoss()
    if options.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = torch.randn(options.batch_size, 3, 224, 224, device=device)
    tokens: Tensor = torch.randint(1, 49000, (options.batch_size, longest))
    position = torch.arange(longest)
    tokens = tokens.masked_fill(position == lengths[:, None] - 1, 49407).masked_fill(position >= lengths[:, None], 0)
    tokens = tokens.to(device)

    def step() -> None:
        with autocast(options.precision, device)():
            image, text, scale = model(images, tokens)
            total = loss(image, text, scale)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def profile(options: argparse.Namespace, device: torch.device) -> None:
    """Print the operators in which one step spends most of its time, as JSON lines."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for arch in options.arch:
        for name in options.method:
            step = our_step(arch, name, options, device)
            for _ in range(max(1, options.warm_up)):
                step()
            wait(device)
            with torch.profiler.profile(activities=activities) as run:
                step()
                wait(device)
            rows = sorted(run.key_averages(), key=lambda row: -getattr(row, kind))
            total = sum(getattr(row, kind) for row in rows)
            for row in rows[: options.profile]:
                spent = getattr(row, kind)
                line = {"name": f"profile {name} {arch} {options.precision}", "operator": row.key}
                line |= {"calls": row.count, "ms": round(spent / 1000, 2), "share": round(spent / total, 4)}
                print(json.dumps(line), flush=True)
            del step
            free(device)


def seconds_in_turn(steps, options: argparse.Namespace, device: torch.device) -> list[list[float]]:
    """Time several steps in alternating runs, so that a busy or throttled machine treats them alike."""
    for step in steps:
        for _ in range(options.warm_up):
            step()
    clock = time.process_time if device.type == "cpu" and options.cpu_time else time.perf_counter
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(options.runs):
        for step, taken in zip(steps, times, strict=True):
            wait(device)
            started = clock()
            for _ in range(options.steps):
                step()
            wait(device)
            taken.append((clock() - started) / options.steps)
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def throughput(options: argparse.Namespace, device: torch.device) -> None:
    for arch in options.arch:
        theirs = None if options.eager else peer_step(arch, options, device)
        for name in options.method:
            step, peer = our_step(arch, name, options, device), (theirs, f"OpenCLIP {open_clip.__version__} CLIP step")
            if options.eager:
                eager = argparse.Namespace(**vars(options) | {"compile": False})
                peer = our_step(arch, name, eager, device), "the same step, not compiled"
            compare(f"{name} {arch}", step, peer, options, device)
            if options.faithful and name == "declip":
                original = original_step(PEERS[arch], options.batch_size, autocast(options.precision, device), device)
                compare(
                    f"{name} {arch}", step, (original, "DeCLIP's step as the original computes it"), options, device
                )
                del original
            del step
            free(device)


def compare(name: str, step, peer, options: argparse.Namespace, device: torch.device) -> None:
    """Time our step and a peer's, with its name, in turn."""
    times, theirs = seconds_in_turn((step, peer[0]), options, device)
    without = "".join(f" without {name}" for name in options.without)
    mode = " compiled" * options.compile + " graphs" * options.graphs
    line = {
        "name": f"train {name} {options.precision}{mode}{without}",
        "ours": round(options.batch_size / statistics.median(times), 1),
        "peer": round(options.batch_size / statistics.median(theirs), 1),
        "peer_name": peer[1],
        "ratio": round(statistics.median(theirs) / statistics.median(times), 3),
        "unit": "pairs/s",
        "runs": len(times),
        "batch_size": options.batch_size,
    }
    if options.peak_tflops and not options.compile:
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops() / statistics.median(times)
        line["share_of_peak"] = round(flops / options.peak_tflops / 1e12, 3)
    if device.type == "cuda":
        line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(line), flush=True)


def free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()


def memory(options: argparse.Namespace, device: torch.device) -> None:
    for arch in options.arch:
        for name in options.method:
            peaks = {}
            for size, micro in ((64, 0), (1024, 64)):
                options.batch_size, options.micro_batch_size = size, micro
                step = our_step(arch, name, options, device)
                step()
                free(device)
                step()
                peaks[size] = torch.cuda.max_memory_allocated() / 2**30
                del step
                free(device)
            line = {
                "name": f"memory {name} {arch} 1024 in 64s",
                "ours": round(peaks[1024], 2),
                "peer": round(peaks[64], 2),
                "peer_name": "the same method at batch 64",
                "ratio": round(peaks[1024] / peaks[64], 3),
                "unit": "GiB",
                "runs": 1,
            }
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["vit-b32"], choices=[*PEERS, "vit-tiny32"])
    parser.add_argument("--method", nargs="+", default=["clip", "declip"], choices=METHODS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eager", action="store_true", help="compare with our own step, not compiled")
    parser.add_argument("--graphs", action="store_true", help="with --compile: replay steps as CUDA graphs")
    parser.add_argument("--captions", choices=["normal", "heavy"], default="normal", help="how long captions are")
    parser.add_argument("--ungrouped", action="store_true", help="encode all texts as long as the longest")
    parser.add_argument("--faithful", action="store_true", help="compare DeCLIP with the original's step, too")
    parser.add_argument("--without", nargs="+", default=[], choices=OLD_WAYS, help="compute these the old way")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time (GPU only)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N operators that take longest")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy CPU: time of this process, not of the clock")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, to print the share reached")
    options = parser.parse_args()
    for name in options.without:
        OLD_WAYS[name]()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (profile if options.profile else memory if options.memory else throughput)(options, device)


if __name__ == "__main__":
    main()
