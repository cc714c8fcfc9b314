"""The indexes of many shards: each is made once, by one of the processes that train together."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from declip_cli.data import storage
from declip_cli.data.shards.block_cache import locked
from declip_cli.data.shards.files import Shard, ShardFiles
from declip_cli.data.shards.index import index_groups, read_indexes, write_indexes
from declip_cli.errors import DataError

T = TypeVar("T")
Say: TypeAlias = Callable[[str], None]

_THREADS = 8
_SHARDS_PER_ROUND = 2 * _THREADS
_SAY_EVERY_S = 5.0
_MAX_MAPPED = 64


def index_path(shard: str) -> str:
    """Name the index file of a shard: `00000.index` beside `00000.tar`."""
    return shard.removesuffix(".tar") + ".index"


def cached_index(facts: str, cache_dir: str) -> str:
    """Name the file in the cache for indexes of something that these facts identify."""
    name = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(cache_dir, "indexes", f"{name[:24]}.index")


def find_index(shard: Shard, *, cache_dir: str) -> tuple[str, str]:
    """Look for the index of a shard as it is now, beside it or in the cache.

    Args:
        shard: which.
        cache_dir: where the index may lie if not beside the shard; one from a store is copied there.

    Returns:
        The local path of the index, empty where it has to be made; and what is wrong with the file there is, empty if
        nothing.

    Raises:
        DataError: the store cannot be reached.
    """
    damage = ""
    beside, cached = index_path(shard.path), place_in_cache(shard, cache_dir)
    if shard.has_index and not os.path.exists(cached):
        storage.make_folder(os.path.dirname(cached))
        storage.write_whole(cached, storage.read_bytes(beside))
    for path in (cached,) if shard.is_remote else (beside, cached):
        try:
            if path == beside and os.path.getmtime(beside) < os.path.getmtime(shard.path):
                continue
            if [index.tar_bytes for index in read_indexes(path, check=True)] == [shard.num_bytes]:
                return path, ""
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            damage = damage or f"{path} is {error}"
    return "", damage


def make_index(shard: Shard, files: ShardFiles, *, cache_dir: str) -> str:
    """Build the index of a shard and save it beside the shard, or in the cache where that cannot be.

    Args:
        shard: which.
        files: reads it.
        cache_dir: where the index goes if it cannot stand beside the shard.

    Returns:
        The local path of the index.

    Raises:
        DataError: the shard cannot be read, or the index can be written nowhere.
    """
    with files.open(shard) as file:
        try:
            index = index_groups(file, shard.path).build(os.path.basename(shard.path), shard.num_bytes)
        except OSError as error:
            raise DataError(f"cannot read the shard {shard.path}: {error}", remedy="check the disk") from error
    beside, cached = index_path(shard.path), place_in_cache(shard, cache_dir)
    if not shard.is_remote and os.access(os.path.dirname(beside) or ".", os.W_OK):
        try:
            write_indexes(beside, [index])
            return beside
        except DataError:  # a full disk, or one mounted for reading only
            pass
    storage.make_folder(os.path.dirname(cached))
    write_indexes(cached, [index])
    return cached


def place_in_cache(shard: Shard, cache_dir: str) -> str:
    """Name the file in the cache for the index of a shard as it is now."""
    address = shard.path if shard.is_remote else os.path.abspath(shard.path)
    return cached_index(f"{address} {shard.stamp}", cache_dir)


def load_indexes(
    shards: Sequence[Shard], files: ShardFiles, *, cache_dir: str, say: Say | None, together: bool
) -> list[str]:
    """Find the indexes of shards; those that are missing, damaged or out of date are made first.

    Where several processes train together they share that work. They meet after every few shards, so that no
    collective runs into its time limit, and an error of one is raised by all.

    Args:
        shards: in order.
        files: reads them.
        cache_dir: where an index goes that cannot stand beside its shard; need not be shared by the machines.
        say: told, on rank 0, of damaged indexes, and of how far it is if that takes more than a few seconds.
        together: every rank of the process group calls this at the same time, with the same shards.

    Returns:
        Local files with one index per shard, in their order: one file each, or, where they are many, one for all.

    Raises:
        DataError: a shard cannot be read, or an index can be written nowhere.
    """
    joined = cached_index("\n".join(f"{shard.path} {shard.stamp}" for shard in shards), cache_dir)
    gather, rank = _ranks(together)
    if all(gather(_is_whole(joined, len(shards)))):
        return [joined]
    tell = say if say is not None and rank == 0 else lambda message: None
    found, damages, said = [""] * len(shards), list[str](), time.monotonic()
    for turn in itertools.count():
        missing = [number for number, path in enumerate(found) if not path]
        looked_up = _run(lambda n: find_index(shards[n], cache_dir=cache_dir), missing, gather)
        for number, (path, damage) in zip(missing, looked_up, strict=True):
            found[number] = path
            damages += [damage] if damage and not turn else []
        missing_of_rank = gather([number for number, path in enumerate(found) if not path])
        if not any(missing_of_rank):
            break
        if damages and not turn:
            tell(f"the index of {len(damages)} shards is made again ({damages[0]})")
        if (now := time.monotonic()) - said > _SAY_EVERY_S:
            num_done, said = len(found) - len(set().union(*missing_of_rank)), now
            tell(f"{num_done:,} of {len(found):,} shards indexed, once for all")
        mine = _share(missing_of_rank)[rank][:_SHARDS_PER_ROUND]
        made = _run(lambda n: make_index(shards[n], files, cache_dir=cache_dir), mine, gather)
        for number, path in zip(mine, made, strict=True):
            found[number] = path
    return found if len(found) <= _MAX_MAPPED else _join(found, joined)


def _run(work: Callable[[int], T], numbers: Sequence[int], gather: Callable[[Any], list[Any]]) -> list[T]:
    """Apply a function to numbers in threads; an error of any rank is raised on all of them."""
    results, error = list[T](), None
    try:
        with ThreadPoolExecutor(_THREADS, "declip-index") as pool:
            results = list(pool.map(work, numbers))
    except DataError as raised:
        error = raised.message, raised.remedy, raised.cause
    for message, remedy, cause in filter(None, gather(error)):
        raise DataError(message, remedy=remedy, cause=cause)
    return results


def _ranks(together: bool) -> tuple[Callable[[Any], list[Any]], int]:
    """Return what collects a value of every rank, in their order, and the number of this one."""
    if together:
        import torch.distributed as dist  # `prepare` does without torch

        from declip_cli.distributed import rank, world_size

        def gather(value: Any) -> list[Any]:  # noqa: ANN401  (anything that can be pickled)
            values = [value] * world_size()
            dist.all_gather_object(values, value)
            return values

        if world_size() > 1:
            return gather, rank()
    return lambda value: [value], 0


def _share(missing_of_rank: Sequence[Sequence[int]]) -> list[list[int]]:
    """Give each shard that any rank misses to one of the ranks that miss it.

    Ranks that find what another has made need no more; those on a machine with a cache of its own share again.
    """
    misses: dict[int, list[int]] = {}
    for rank, missing in enumerate(missing_of_rank):
        for number in missing:
            misses.setdefault(number, []).append(rank)
    shares: list[list[int]] = [[] for _ in missing_of_rank]
    for turn, (number, ranks) in enumerate(sorted(misses.items())):
        shares[ranks[turn % len(ranks)]].append(number)
    return shares


def _is_whole(path: str, num_shards: int) -> bool:
    try:
        return len(read_indexes(path, check=True)) == num_shards
    except (OSError, ValueError):
        return False


def _join(paths: Sequence[str], joined: str) -> list[str]:
    """Write one file for many, which all processes of the machine map."""
    with locked(f"{joined}.lock"):
        if not _is_whole(joined, len(paths)):
            storage.make_folder(os.path.dirname(joined))
            write_indexes(joined, (index for path in paths for index in read_indexes(path, check=False)))
    return [joined]
