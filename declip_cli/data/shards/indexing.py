"""The indexes of many shards: each is made once, by one of the processes of a machine."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeAlias

from declip_cli.data import storage
from declip_cli.data.shards.files import Piece, Shard, ShardFiles, locked
from declip_cli.data.shards.index import index_groups, read_indexes, write_indexes
from declip_cli.errors import DataError

Log: TypeAlias = Callable[[str], None]

_THREADS = 8
_LOG_EVERY_S = 5.0
_MAX_MAPPED = 64


def index_path(shard: str) -> str:
    """Name the index file of a shard: `00000.index` beside `00000.tar`."""
    return shard.removesuffix(".tar") + ".index"


def cached_index(facts: str, cache_dir: str) -> str:
    """Name the file in the cache for indexes of something that these facts identify."""
    name = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(cache_dir, "indexes", f"{name[:24]}.index")


def lacks_index(shard: Shard, *, cache_dir: str) -> bool:
    """Return whether opening a shard means going through it first; errors as in `find_index`."""
    return not shard.sha256 and not shard.has_index and not find_index(shard, cache_dir=cache_dir)[0]


def index_damage(path: str, shards: Sequence[Shard]) -> str:
    """Say what keeps a local file from being the indexes of some shards; empty if nothing."""
    try:
        sizes = [index.tar_bytes for index in read_indexes(path, check=True)]
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return str(error)
    return "" if sizes == [shard.num_bytes for shard in shards] else "out of date"


def copy_index(url: str, local: str, shards: Sequence[Shard]) -> str:
    """Copy indexes from a store to the cache, once for all processes of the machine; return as `index_damage`."""
    damage = index_damage(local, shards)
    if damage:
        with locked(f"{local}.lock"), suppress(FileNotFoundError):
            damage = index_damage(local, shards)
            if damage:
                storage.make_folder(os.path.dirname(local))
                storage.write_whole(local, storage.read_bytes(url))
                damage = index_damage(local, shards)
    return damage


def find_index(shard: Shard, *, cache_dir: str) -> tuple[str, str]:
    """Look for the index of a shard as it is now, beside it or in the cache, where one from a store is copied.

    Returns:
        The local path of the index, empty where it has to be made; and what is wrong with the file there is, empty if
        nothing.

    Raises:
        DataError: the store cannot be reached.
    """
    beside, cached, found = index_path(shard.path), _place_in_cache(shard, cache_dir), ""
    if shard.has_index:
        copy_index(beside, cached, [shard])
    for path in (cached,) if shard.is_remote else (beside, cached):
        damage = index_damage(path, [shard])
        is_old = path == beside and not damage and os.path.getmtime(beside) < os.path.getmtime(shard.path)
        if not damage and not is_old:
            return path, ""
        if damage not in ("", "missing", "out of date"):
            found = found or f"{path} is {damage}"
    return "", found


def find_or_make_index(shard: Shard, files: ShardFiles, *, fetches: bool = False) -> tuple[str, str]:
    """Find the index of a shard; make one if need be, while other processes that want it wait.

    It is saved beside the shard, or in the cache where that cannot be.

    Args:
        shard: which.
        files: reads it.
        fetches: bring the whole shard into the cache to read it, as its samples are wanted, too.

    Returns:
        The local path of the index; and what was wrong with the file before, empty if nothing.

    Raises:
        DataError: the shard cannot be read, or the index can be written nowhere.
    """
    path, damage = find_index(shard, cache_dir=files.cache_dir)
    if path:
        return path, ""
    with locked(f"{_place_in_cache(shard, files.cache_dir)}.lock"):
        path, _ = find_index(shard, cache_dir=files.cache_dir)
        if not path:
            if fetches:
                files.fetch(Piece(shard, 0, shard.num_bytes))
            path = _make_index(shard, files)
    return path, damage


def _make_index(shard: Shard, files: ShardFiles) -> str:
    with files.open(shard) as file:
        try:
            index = index_groups(file, shard.path).build(os.path.basename(shard.path), shard.num_bytes)
        except OSError as error:
            raise DataError(f"cannot read the shard {shard.path}: {error}", remedy="check the disk") from error
    beside, cached = index_path(shard.path), _place_in_cache(shard, files.cache_dir)
    if not shard.is_remote and os.access(os.path.dirname(beside) or ".", os.W_OK):
        with suppress(DataError):  # a full disk, or one mounted for reading only
            write_indexes(beside, [index])
            return beside
    storage.make_folder(os.path.dirname(cached))
    write_indexes(cached, [index])
    return cached


def _place_in_cache(shard: Shard, cache_dir: str) -> str:
    address = shard.path if shard.is_remote else os.path.abspath(shard.path)
    return cached_index(f"{address} {shard.stamp}", cache_dir)


def load_indexes(
    shards: Sequence[Shard], files: ShardFiles, *, log: Log | None, all_done: Callable[[bool], bool]
) -> list[str]:
    """Find the indexes of shards; those that are missing, damaged or out of date are made first.

    Processes that do so at the same time share the work: each takes the shards in an order of its own and finds most
    of what the others have made.

    Args:
        shards: in order.
        files: reads them.
        log: receives notes on damaged indexes, and the progress if indexing takes more than a few seconds.
        all_done: called every few seconds with False, as this is not done.

    Returns:
        Local files with one index per shard, in their order: one file each, or, where they are many, one for all.

    Raises:
        DataError: a shard cannot be read, or an index can be written nowhere.
    """
    joined = cached_index("\n".join(f"{shard.path} {shard.stamp}" for shard in shards), files.cache_dir)
    if not index_damage(joined, shards):
        return [joined]
    log = log or (lambda message: None)
    numbers = random.sample(range(len(shards)), len(shards))
    found, damages, said = [""] * len(shards), list[str](), time.monotonic()
    with ThreadPoolExecutor(_THREADS, "declip-index") as pool:
        results = pool.map(lambda number: find_or_make_index(shards[number], files), numbers)
        for num_done, (number, (path, damage)) in enumerate(zip(numbers, results, strict=True), 1):
            found[number] = path
            damages += [damage] if damage else []
            if (now := time.monotonic()) - said > _LOG_EVERY_S:
                said = now
                log(f"{num_done:,} of {len(found):,} shards indexed, once for all")
                all_done(False)
    if damages:
        log(f"the index of {len(damages)} shards was made again ({min(damages)})")
    if len(found) <= _MAX_MAPPED:
        return found
    with locked(f"{joined}.lock"):
        if index_damage(joined, shards):
            storage.make_folder(os.path.dirname(joined))
            write_indexes(joined, (index for path in found for index in read_indexes(path, check=False)))
    return [joined]
