"""Open tar shards that the user names: folders made by `declip prepare`, or anybody's archives."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from declip_cli.data import storage
from declip_cli.data.shards.dataset import LazyShardDataset, ShardDataset, Shards
from declip_cli.data.shards.files import Shard, ShardFiles
from declip_cli.data.shards.indexing import Log, cached_index, copy_index, index_damage, index_path, load_indexes
from declip_cli.errors import DataError
from declip_cli.files import parse_json

MANIFEST = "manifest.json"
JOINED = "shards.index"
"""The indexes of all shards of a folder made by `declip prepare`, in one file."""
CACHE_GB = 100.0
PREPARE = "declip prepare SOURCE --out SHARDS, then --data SHARDS"
_SHARD_FACTS = {"name": str, "num_bytes": int, "sha256": str}
_ENDINGS = (".tar", ".index")
_THREADS = 16


class NoShardsError(DataError):
    """A path names no tar shards; it may well name other data."""


def default_cache_dir() -> str:
    """Return `$DECLIP_CACHE`, else `~/.cache/declip`."""
    return os.environ.get("DECLIP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "declip")


def open_shards(
    paths: Sequence[str],
    *,
    split: str | None = None,
    cache_dir: str | None = None,
    log: Log | None = None,
    should_count: Callable[[Sequence[Shard]], bool] | None = None,
    cache_gb: float = CACHE_GB,
) -> Shards:
    """Open shards by folder, file or pattern.

    Args:
        paths: folders made by `declip prepare`, tar files, patterns such as `cc3m/{00000..00331}.tar`, or URLs of
            these.
        split: named split of the data; None or `train` is what lies in the folder itself.
        cache_dir: local folder for indexes and for what is fetched; None uses `$DECLIP_CACHE`, else `~/.cache/declip`.
        log: receives notes on damaged indexes, and the progress of indexing shards for the first time.
        should_count: given all shards, decides whether to go first through those that have no index; if not, they are
            indexed when their turn comes. Every rank of a process group opens the same shards now. None goes through
            them, on this rank alone.
        cache_gb: how many gigabytes of remote shards may be in the cache.

    Returns:
        All pairs of all paths, in the order given.

    Raises:
        NoShardsError: a path names no shards.
        DataError: a shard is missing, is not readable, or there is no pair.
    """
    files = ShardFiles(cache_dir or default_cache_dir(), int(cache_gb * 1e9))
    found = [find_shards(path, split or "") for path in paths]
    shards = [shard for some, _ in found for shard in some]
    all_done = _all_done if should_count is not None else bool
    data: Shards
    if should_count is not None and not should_count(shards):
        data = LazyShardDataset(shards, files)
    else:
        index_files: list[str] = []
        for some, digest in found:
            joined = _joined_index(some, digest, files.cache_dir, log) if digest and some else ""
            index_files += [joined] if joined else load_indexes(some, files, log=log, all_done=all_done)
        data = ShardDataset(shards, files, index_files)
        if not len(data):
            raise DataError(f"no image-text pair in {', '.join(paths)} ({data.skipped or 'empty'})", remedy=PREPARE)
        while not all_done(True):
            pass
    data.name, data.split = " ".join(paths), split or ""
    return data


def _all_done(is_done: bool) -> bool:
    """Return whether all ranks are done: they meet so often that who waits for the others runs into no time limit."""
    from declip_cli.process_group import from_all  # `prepare` does without torch

    return all(from_all(is_done))


def find_shards(path: str, split: str = "") -> tuple[list[Shard], str]:
    """Look for what a folder, a file or a pattern means; arguments and errors as in `open_shards`.

    Returns:
        The shards, in order; and the digest of the index that joins theirs, empty if they have none.
    """
    folder = path if split in ("", "train") else storage.join(path, split)
    is_archive = path.endswith(".tar") and folder == path
    if not is_archive and (manifest := read_manifest(folder)):
        return _prepared(folder, manifest["shards"]), str(manifest.get("index_sha256", ""))
    listed = {} if is_archive else _list(folder)
    if found := [_shard(path, listed) for path in listed if path.endswith(".tar")]:
        return found, ""
    if not is_archive and storage.is_folder(folder):
        raise NoShardsError(f"no .tar shards in the folder {folder}", remedy=PREPARE.replace("SOURCE", folder))
    if folder != path:
        find_shards(path, "")  # raises an error of its own where that is no folder of shards
        remedy = f"declip prepare SOURCE --out {path} --split {split}=0.01"
        raise DataError(f"{path} has no split {split!r}", remedy=remedy)
    expanded = storage.expand(path)
    if wrong := next((name for name in expanded if not name.endswith(".tar")), ""):
        raise NoShardsError(f"{wrong} is not a .tar shard", remedy=PREPARE)
    for above in {storage.parent(name) for name in expanded if not name.startswith("http")}:  # which cannot be listed
        listed |= _list(above)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [shard for shard in pool.map(lambda name: _shard(name, listed), expanded) if shard.num_bytes >= 0]
    missing = [name for name in expanded if name not in {shard.path for shard in found}]
    if missing or not expanded:
        raise DataError(
            f"no such shard: {(missing or [path])[0]} ({len(missing)} of {len(expanded)} are missing)",
            remedy="check the path; a folder, a .tar file or a pattern such as shards/{00000..00127}.tar",
        )
    return found, ""


def _list(folder: str) -> dict[str, storage.FileFacts]:
    """Look up the shards and indexes in a folder in one request, by their paths."""
    return {storage.join(folder, name): facts for name, facts in storage.list_files(folder, _ENDINGS).items()}


def _shard(path: str, listed: Mapping[str, storage.FileFacts]) -> Shard:
    """Describe a shard, which has -1 bytes if it is not there."""
    name = storage.join(storage.parent(path), os.path.basename(path))
    try:
        facts = listed.get(name) or storage.facts(path)
    except OSError:
        return Shard(path, -1, "")
    index = listed.get(index_path(name))
    has_index = storage.is_remote(path) and index is not None and index.changed >= facts.changed
    return Shard(path, facts.num_bytes, facts.stamp, has_index=has_index)


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the manifest of a folder made by `declip prepare`, local or remote; empty if there is none.

    Raises:
        DataError: it is damaged.
    """
    path = storage.join(folder, MANIFEST)
    try:
        manifest: dict[str, Any] = parse_json(storage.read_bytes(path))
        for shard in manifest["shards"]:
            if not all(isinstance(shard[fact], kind) for fact, kind in _SHARD_FACTS.items()):
                raise TypeError("a shard without name, size or sha256")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}", remedy="run the same declip prepare with --force") from error


def _prepared(folder: str, listed: Sequence[dict[str, Any]]) -> list[Shard]:
    """Take the word of a manifest for shards far away, so that opening costs one request, and one for the index."""
    is_remote = storage.is_remote(folder)
    there = {} if is_remote else storage.list_files(folder, _ENDINGS)
    found = []
    for facts in listed:
        name, num_bytes, sha256 = facts["name"], facts["num_bytes"], facts["sha256"]
        path = storage.join(folder, name)
        if not is_remote and (name not in there or there[name].num_bytes != num_bytes):
            state = f"has {there[name].num_bytes:,} bytes instead of {num_bytes:,}" if name in there else "is missing"
            raise DataError(f"the shard {path} {state}", remedy="copy it again, or prepare the data again")
        found.append(Shard(path, num_bytes, sha256, sha256, has_index=is_remote))
    return found


def _joined_index(shards: Sequence[Shard], digest: str, cache_dir: str, log: Log | None) -> str:
    """Find the joined index of a prepared folder; a remote one is copied to the cache of the machine."""
    path = storage.join(storage.parent(shards[0].path), JOINED)
    is_remote = storage.is_remote(path)
    local = cached_index(digest, cache_dir) if is_remote else path
    damage = copy_index(path, local, shards) if is_remote else index_damage(local, shards)
    if damage and log is not None:
        log(f"{path} is {damage}; the indexes of the shards are used")
    return "" if damage else local
