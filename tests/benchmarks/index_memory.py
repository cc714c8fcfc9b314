"""Start-up and memory with millions of pairs and no image: python tests/benchmarks/index_memory.py --pairs 10."""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from declip_cli.data.shards.dataset import ShardDataset
from declip_cli.data.shards.files import Shard, ShardFiles
from declip_cli.data.shards.index import IndexBuilder, ShardIndex, write_indexes

SHARD_SAMPLES = 10_000
_OPEN = """
import json, pickle, random, sys, time
from pathlib import Path
import declip_cli.data.shards.dataset
from declip_cli.data.shards.index import read_indexes
def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().split("\\n")
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line}
    return kilobytes["Anonymous"] / 1024, kilobytes["Rss"] / 1024
before, began = memory(), time.perf_counter()
if sys.argv[2] == "check":
    read_indexes(sys.argv[3], check=True)
data = pickle.loads(Path(sys.argv[1]).read_bytes())
data.block_firsts
opened, seconds = memory(), time.perf_counter() - began
rng = random.Random(0)
for _ in range(int(sys.argv[4])):
    _, index, row = data._locate(rng.randrange(len(data)))
    index.image_span(row), index.caption_span(row)
used = memory()
names = ("anonymous_mb", "resident_mb")
line = {"name": f"open, {sys.argv[2]}", "pairs": len(data), "seconds": round(seconds, 2)}
line |= {f"{name}_opened": round(b - a, 1) for name, a, b in zip(names, before, opened)}
line |= {f"{name}_used": round(b - a, 1) for name, a, b in zip(names, before, used)}
print(json.dumps(line))
"""


def indexes(num_shards):
    """Make up indexes of shards of 10,000 pairs of 25 kB."""
    builder = IndexBuilder()
    for row in range(SHARD_SAMPLES):
        builder.add(f"{row:09d}", (row * 25_600 + 512, 24_000), (row * 25_600 + 25_088, 200), is_json=True)
    index = builder.build("", SHARD_SAMPLES * 25_600 + 1024)
    for number in range(num_shards):
        yield ShardIndex(index.facts | {"name": f"{number:05d}.tar"}, index.body)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=float, default=10.0, help="millions")
    parser.add_argument("--lookups", type=int, default=100_000)
    options = parser.parse_args()
    num_shards = int(options.pairs * 1e6) // SHARD_SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        path, began = f"{folder}/shards.index", time.perf_counter()
        write_indexes(path, indexes(num_shards))
        facts = {"name": "index", "pairs": num_shards * SHARD_SAMPLES, "mb": round(Path(path).stat().st_size / 1e6, 1)}
        print(json.dumps(facts | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)
        shards = [Shard(f"s3://far/{n:05d}.tar", SHARD_SAMPLES * 25_600 + 1024, str(n)) for n in range(num_shards)]
        data = ShardDataset(shards, ShardFiles(folder, 1), [path])
        assert int(np.diff(data.block_firsts).sum()) == len(data)
        (Path(folder) / "reopen").write_bytes(pickle.dumps(data))
        for how in ("check", "reopen"):
            program = [sys.executable, "-c", _OPEN, f"{folder}/reopen", how, path, str(options.lookups)]
            subprocess.run(program, check=True)


if __name__ == "__main__":
    main()
