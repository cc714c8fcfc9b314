"""Pairs a second of real training: real shards, real caption lengths, the real loader, on a CPU or a GPU.

python tests/benchmarks/end_to_end.py --arch vit-b32 --batch-size 1024 --method clip declip; one JSON line for each way
of loading: the rate, against that of steps on one batch that is there already, and the share of time spent waiting.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from pathlib import Path

import torch
from lines import report
from made_up_shards import write_shards

from declip_cli.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from declip_cli.data.dataset import Dataset
from declip_cli.data.shards.store import open_shards
from declip_cli.resolve import DataFacts, resolve
from declip_cli.train.build import Training, build_training, find_machine
from declip_cli.train.loop import take_step


def training_of(config: RunConfig, samples: Dataset) -> Training:
    """Put a run together that leaves no files."""
    facts = DataFacts(num_pairs=len(samples), fingerprint=samples.fingerprint)
    run = resolve(config, data=facts, machine=find_machine(config))
    return build_training(run, samples, path=Path())


def rate(training: Training, steps: int) -> tuple[float, float]:
    """Take some steps, after two that are not counted; return pairs a second and the share of time spent waiting."""
    for _ in range(2):
        take_step(training, 1e-5)
    _wait(training)
    waited, started = training.stream.wait_seconds, time.perf_counter()
    for _ in range(steps):
        take_step(training, 1e-5)
    _wait(training)
    seconds = time.perf_counter() - started
    num = steps * training.config.train.batch_size
    return num / seconds, (training.stream.wait_seconds - waited) / seconds


def _wait(training: Training) -> None:
    if training.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


class SameBatch(itertools.repeat):  # type: ignore[type-arg]
    """A batch that is there already, again and again."""

    wait_seconds = 0.0


def main() -> None:
    """Print two lines for each method and way of loading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit-tiny32")
    parser.add_argument("--side-px", type=int, default=None, help="of the views; the architecture's own by default")
    parser.add_argument("--method", nargs="+", default=["clip", "declip"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--loader", nargs="+", default=["threads", "processes"])
    parser.add_argument("--order", nargs="+", default=["exact", "blocks"])
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = open_shards(write_shards(Path(folder), options.pairs), cache_dir=folder)
        for method in options.method:
            config = RunConfig(
                model=ModelConfig(arch=options.arch, image_side_px=options.side_px),
                method=MethodConfig(name=method),
                train=TrainConfig(batch_size=options.batch_size, steps=1000),
            )
            training = training_of(config, samples)
            stream = training.stream
            training.stream = training.batches = SameBatch(next(training.batches))  # type: ignore[assignment]
            stream.close()
            most, _ = rate(training, options.steps)
            for loader, order in itertools.product(options.loader, options.order):
                data = DataConfig(loader=loader, order=order, workers=options.workers)
                training = training_of(dataclasses.replace(config, data=data), samples)
                found, waiting = rate(training, options.steps)
                training.stream.close()
                name = f"training {method} on {options.arch}, {training.run.machine.workers} {loader}, {order}"
                peer = f"{options.batch_size} pairs that are there already"
                report(name, found, most, peer_name=peer, unit="pairs/s", runs=options.steps, ratio=found / most)
                report(f"{name}: waiting", waiting, 0, peer_name=peer, unit="fraction", runs=options.steps, ratio=0)


if __name__ == "__main__":
    main()
