"""How much a busy loader slows down the thread that launches a GPU's work, and what it gives meanwhile.

python tests/benchmarks/launches.py; times 3,000 small operations of torch in the main thread while batches are made by
no, one, two and four loader threads, in this process and in others; and how long a pair holds the interpreter. The main
thread has a core of its own, and what it waits for a core is left out (Linux tells), as where there are cores enough:
what is measured is the wait for the interpreter.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import torch
from lines import report
from made_up_shards import write_shards

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.loader import StreamConfig
from declip_cli.data.shards.store import open_shards
from declip_cli.data.stream import TrainStream

NUM_OPERATIONS, BATCH_SIZE, SIDE_PX = 3000, 64, 224
CONFIG = StreamConfig(
    views=Views(images=("augmented", "augmented"), texts=("plain", "masked")),
    augment=AugmentConfig(),
    side_px=SIDE_PX,
    context_length=77,
    batch_size=BATCH_SIZE,
    seed=0,
    cache_mib=0,
)


def launch() -> float:
    """Time small operations, in milliseconds, without what the thread waits for a core."""
    value = torch.zeros(8)
    started = time.perf_counter() - _seconds_without_a_core()
    for _ in range(NUM_OPERATIONS):
        value.add_(1)
    return 1000 * (time.perf_counter() - _seconds_without_a_core() - started)


def _seconds_without_a_core() -> float:
    with open("/proc/thread-self/schedstat") as file:
        return int(file.read().split()[1]) / 1e9


def with_loader(paths: list[str], workers: int, loader: str, runs: int) -> tuple[float, float]:
    """Return milliseconds of the operations while a loader has always something to do, and its pairs a second."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)  # what is started now stays there
    stream = TrainStream(
        open_shards(paths),
        dataclasses.replace(CONFIG, workers=workers, loader=loader),  # type: ignore[arg-type]
    )
    next(stream)
    os.sched_setaffinity(0, cores[:1])  # this thread alone
    times, num, started = [], 0, time.perf_counter()
    for _ in range(runs):
        next(stream)  # so that room is free, and all threads are busy
        num += 1
        times.append(launch())
    seconds = time.perf_counter() - started
    stream.close()
    os.sched_setaffinity(0, cores)
    return statistics.median(times), num * BATCH_SIZE / seconds


def lock_held_per_pair(paths: list[str], num: int) -> tuple[float, float]:
    """Return the milliseconds that a pair takes, and those outside of calls that let the interpreter go."""
    stream = TrainStream(open_shards(paths), CONFIG)
    next(stream)
    inside = [0.0]
    names = ("imdecode", "resize", "flip", "cvtColor", "transform", "sepFilter2D", "GaussianBlur", "LUT", "addWeighted")
    originals = {name: getattr(cv2, name) for name in names}

    def timed(name: str):  # noqa: ANN202
        def call(*arguments: object, **options: object) -> object:
            started = time.thread_time()
            try:
                return originals[name](*arguments, **options)
            finally:
                inside[0] += time.thread_time() - started

        return call

    for name in names:
        setattr(cv2, name, timed(name))
    started = time.thread_time()
    for _ in range(num):
        next(stream)
    whole = time.thread_time() - started
    for name, original in originals.items():
        setattr(cv2, name, original)
    return 1000 * whole / num / BATCH_SIZE, 1000 * (whole - inside[0]) / num / BATCH_SIZE


def main() -> None:
    """Print one line for each number of threads, and for a pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), options.pairs)
        whole, held = lock_held_per_pair(paths, 8)
        report(
            "loader, interpreter held per pair",
            held,
            whole,
            peer_name="all of it",
            unit="ms",
            runs=8,
            ratio=whole / held,
        )
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])
        alone = statistics.median(launch() for _ in range(options.runs))
        os.sched_setaffinity(0, cores)
        for workers in options.threads:
            figures = {kind: with_loader(paths, workers, kind, options.runs) for kind in ("threads", "processes")}
            for kind, (milliseconds, rate) in figures.items():
                name = f"launching beside {workers} loader threads, {'here' if kind == 'threads' else 'in processes'}"
                values = {"peer_name": "no loader", "unit": "ms", "runs": options.runs}
                report(name, milliseconds, alone, ratio=alone / milliseconds, **values)  # type: ignore[arg-type]
                peer = figures["threads"][1]
                values = {"peer_name": "threads here", "unit": "pairs/s", "runs": options.runs}
                report(f"{name}, throughput", rate, peer, ratio=rate / peer, **values)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
