"""Pairs a second from a store with 30 ms a request, by the block and one by one: python tests/benchmarks/remote.py."""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from lines import report

from declip_cli.data import storage
from declip_cli.data.loader import ROWS_PER_TASK
from declip_cli.data.order import BlockOrder
from declip_cli.data.prepare.process import Pair
from declip_cli.data.prepare.shard_writer import SplitWriter
from declip_cli.data.shards.store import open_shards
from declip_cli.data.stream import ReadAhead


class Slow(MemoryFileSystem):
    """Files in memory that take a while to answer; counts what is asked."""

    protocol = "slow"
    store, pseudo_dirs = {}, [""]
    latency_s, num_asked = 0.0, 0

    def cat_file(self, path, start=None, end=None, **options):
        Slow.num_asked += 1
        time.sleep(Slow.latency_s)
        return super().cat_file(path, start=start, end=end, **options)


def write(folder, *, num, image_bytes, shard_samples):
    with tempfile.TemporaryDirectory() as staging:
        writer = SplitWriter(folder, staging, shard_samples=shard_samples, state={})
        for number in range(num):
            caption = f"number {number} " + "of many words " * 4
            writer.add(Pair(f"{number}", (caption,), os.urandom(image_bytes), (1, 1), (1, 1)))
        writer.finish_shard()
        manifest = {"shards": writer.shards, "index_sha256": writer.join_indexes()}
    storage.write_whole(f"{folder}/manifest.json", json.dumps(manifest).encode())


def rate_by_block(data, threads):
    def work(span):
        block, (first, end) = span
        data.fetch(block)
        for number in range(first, end):
            data.read(number)
        data.release(block)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, enumerate(pairwise(data.block_firsts.tolist()))))
    return len(data) / (time.perf_counter() - began)


def rate_one_by_one(data, threads, num):
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(data.read, range(0, len(data), len(data) // num)))
    return num / (time.perf_counter() - began)


def rate_in_order(data, threads, *, num_streams=8, open_blocks=32, batch_size=256):
    """Read as training does: shuffled among open blocks, fetched ahead by the order, released behind."""

    def read(indices):
        for number in indices:
            data.read(number)

    order = BlockOrder(data.block_firsts, 0, num_streams=num_streams, open_blocks=open_blocks)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as fetchers, ThreadPoolExecutor(threads) as readers:
        ahead = ReadAhead(order, SimpleNamespace(fetch=lambda blocks: fetchers.map(data.fetch, blocks)))
        for first in range(0, len(data) - batch_size + 1, batch_size):
            positions = np.arange(first, first + batch_size)
            used_up = ahead.move_to(0, positions)
            indices = order.indices(0, positions).tolist()
            tasks = [indices[row : row + ROWS_PER_TASK] for row in range(0, batch_size, ROWS_PER_TASK)]
            list(readers.map(read, tasks))
            list(map(data.release, used_up))
        seconds = time.perf_counter() - began
        fetchers.shutdown(cancel_futures=True)
    return len(data) / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12_000)
    parser.add_argument("--image-bytes", type=int, default=25_000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    options = parser.parse_args()
    fsspec.register_implementation("slow", Slow)
    write("slow://set", num=options.pairs, image_bytes=options.image_bytes, shard_samples=2000)
    Slow.latency_s = options.latency_ms / 1000
    with tempfile.TemporaryDirectory() as cache:
        Slow.num_asked, began = 0, time.perf_counter()
        data = open_shards(["slow://set"], cache_dir=cache, cache_gb=2)
        seconds, num_start = time.perf_counter() - began, Slow.num_asked
        print(json.dumps({"name": "start-up", "seconds": round(seconds, 3), "requests": num_start}), flush=True)
        single, num_single = rate_one_by_one(data, options.threads, 1000), Slow.num_asked - num_start
        block = rate_by_block(data, options.threads)
        num_block = (Slow.num_asked - num_start - num_single) / options.pairs * 1000
        Slow.num_asked = 0
    with tempfile.TemporaryDirectory() as cache:
        data = open_shards(["slow://set"], cache_dir=cache, cache_gb=2)
        Slow.num_asked = 0
        in_order = rate_in_order(data, options.threads)
        num_in_order = Slow.num_asked / options.pairs * 1000
    facts = {"peer_name": "single reads", "runs": 1}
    report("read, remote", block, single, unit="pairs/s", ratio=block / single, **facts)
    report("read, remote, in training order", in_order, single, unit="pairs/s", ratio=in_order / single, **facts)
    facts["unit"] = "a thousand pairs"
    ratio = num_single / num_in_order
    report("requests, remote, in training order", num_in_order, num_single, ratio=ratio, **facts)
    del facts["unit"]
    report("requests, remote", num_block, num_single, unit="a thousand pairs", ratio=num_single / num_block, **facts)


if __name__ == "__main__":
    main()
