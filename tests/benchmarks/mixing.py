"""How well orders mix shards that are sorted by class, against an exact shuffle: one JSON line for each figure.

python tests/benchmarks/mixing.py; nothing is read, so the figures are the same on every machine.
"""

import argparse
from collections.abc import Iterator
from itertools import islice

import numpy as np
from lines import report
from numpy.typing import NDArray

from declip_cli.data.order import BlockOrder, ExactOrder

Numbers = NDArray[np.int64]
STREAMING_BLOCK = 262_144
"""Samples that Streaming's py1br shuffles among each other, on one node."""
WEBDATASET_BUFFER, WEBDATASET_START = 5000, 1000
"""Samples in the buffer of each worker, as OpenCLIP sets it."""


def webdataset(num: int, shard: int, batch: int, workers: int, rng: np.random.Generator) -> Numbers:
    """Shuffle as WebDataset: workers have shards of their own, a buffer each, and hand out whole batches in turn."""
    shards = rng.permutation(num // shard)
    streams = [_buffered(shards[worker::workers], shard, rng) for worker in range(workers)]
    batches = [np.fromiter(stream, np.int64) for stream in streams]
    cut = [indices[: len(indices) // batch * batch].reshape(-1, batch) for indices in batches]
    return np.concatenate([part[i] for i in range(max(map(len, cut))) for part in cut if i < len(part)])


def _buffered(shards: Numbers, size: int, rng: np.random.Generator) -> Iterator[int]:
    buffer: list[int] = []
    indices = iter((shards[:, None] * size + np.arange(size)).reshape(-1).tolist())
    for number in indices:
        buffer.append(number)
        if len(buffer) < WEBDATASET_BUFFER:
            buffer.extend(islice(indices, 1))  # it fills while it gives
        if len(buffer) >= WEBDATASET_START:
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    yield from rng.permutation(buffer).tolist()


def py1br(num: int, shard: int, rng: np.random.Generator) -> Numbers:
    """Shuffle as Streaming: shards in random order, then exactly inside blocks of about 262,144 samples."""
    indices = (rng.permutation(num // shard)[:, None] * shard + np.arange(shard)).reshape(-1)
    place = 0
    while place < num:
        size = int(STREAMING_BLOCK * rng.uniform(0.75, 1.25))
        rng.shuffle(indices[place : place + size])
        place += size
    return indices


def figures(indices: Numbers, shard: int, batch: int) -> dict[str, float]:
    """Measure an order: where neighbors of a shard end up, and how much of a batch one shard gives."""
    place = np.empty(indices.max() + 1, np.int64)
    place[indices] = np.arange(len(indices))
    apart = np.abs(np.diff(place[: len(indices) // shard * shard].reshape(-1, shard), axis=1))
    shards = indices[: len(indices) // batch * batch].reshape(-1, batch) // shard
    share = [np.bincount(row).max() / batch for row in shards]
    values = {f"distance of shard neighbors, {q:g} %": float(np.percentile(apart, q)) for q in (5, 50, 95)}
    return values | {
        "share of neighbors in one batch": float((apart < batch).mean()),
        "largest share of a batch from one shard, mean": float(np.mean(share)),
        "largest share of a batch from one shard, 99 %": float(np.percentile(share, 99)),
    }


def main() -> None:
    """Print the figures of each order beside those of the exact one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--shard", type=int, default=10_000, help="pairs of a shard, all of one class")
    parser.add_argument("--block", type=int, default=320, help="pairs of a block of 8 MiB")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--streams", type=int, default=64)
    options = parser.parse_args()
    num, shard, batch = options.pairs - options.pairs % options.shard, options.shard, options.batch
    rng = np.random.default_rng(0)
    firsts = np.unique(np.append(np.arange(0, num, options.block), num))
    orders = {
        f"blocks, {count} open": BlockOrder(firsts, 0, num_streams=options.streams, open_blocks=count).indices(
            0, np.arange(num)
        )
        for count in (64, 128, 512)
    }
    orders["WebDataset's buffer, 8 workers"] = webdataset(num, shard, batch, 8, rng)
    orders["Streaming's py1br"] = py1br(num, shard, rng)
    exact = figures(ExactOrder(num, 0).indices(0, np.arange(num)), shard, batch)
    for name, indices in orders.items():
        for what, value in figures(indices, shard, batch).items():
            peer = exact[what]
            unit = "positions" if "distance" in what else "fraction"
            ratio = value / peer if peer else 0.0
            report(f"{name}: {what}", value, peer, peer_name="exact shuffle", unit=unit, runs=1, ratio=ratio)


if __name__ == "__main__":
    main()
