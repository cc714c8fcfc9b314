"""What each process does in test_indexing.py: open folders of tars that have no index yet, all at once."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from declip_cli.data.shards import indexing
from declip_cli.data.shards.store import open_shards
from declip_cli.errors import DataError


def run(root, rank, num_ranks):
    """Open every folder in `root`; leave what was found or raised, and which shards were indexed here."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=num_ranks)
    indexing._MEET_EVERY_S = 0.05
    build, access, built = indexing.index_groups, os.access, []

    def counted(file, shard):
        if "broken" in shard and rank == 1:
            raise OSError("input/output error")
        built.append(Path(shard).name)
        return build(file, shard)

    indexing.index_groups = counted
    results = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "."):
        built.clear()
        is_protected = folder.name == "protected"
        os.access = (lambda *args: False) if is_protected else access
        cache = root / (f".cache-{rank // 2}" if is_protected else ".cache")
        dist.barrier()
        try:
            store = open_shards([str(folder)], cache_dir=str(cache), together=True)
            results[folder.name] = {"found": [len(store), store.fingerprint], "built": list(built)}
        except DataError as error:
            results[folder.name] = {"error": error.message}
    (root / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
