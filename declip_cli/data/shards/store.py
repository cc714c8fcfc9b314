"""Image-text pairs in tar shards, read by number."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from declip_cli.data.samples import RawSample
from declip_cli.data.shards import storage
from declip_cli.data.shards.files import ShardFiles
from declip_cli.data.shards.index import ShardIndex
from declip_cli.data.shards.indexing import Say, load_indexes
from declip_cli.data.shards.tar_samples import captions_of, group_of
from declip_cli.errors import DataError
from declip_cli.files import parse_json

MANIFEST = "manifest.json"
_SHARD_FACTS = {"name": str, "num_bytes": int, "sha256": str}
PREPARE = "declip prepare SOURCE --out SHARDS, then --data SHARDS"


class ShardStore:
    """The pairs of many shards as one sequence; thread-safe; 16 bytes of memory a pair."""

    def __init__(
        self,
        shards: Sequence[str],
        indexes: Sequence[ShardIndex],
        *,
        fingerprint: str,
        cache_dir: str,
    ) -> None:
        self.fingerprint = fingerprint
        self.skipped: dict[str, tuple[int, str]] = {}
        for index in indexes:
            merge_skipped(self.skipped, index.skipped)
        self._shards = list(shards)
        self._files = ShardFiles(self._shards, cache_dir=cache_dir)
        self._firsts = [0, *accumulate(len(index.spans) for index in indexes)]
        self._spans = np.concatenate([index.spans for index in indexes])  # (N, 2)

    def __len__(self) -> int:
        return self._firsts[-1]

    def read(self, number: int) -> RawSample:
        """Read one pair; see `SampleStore.read`."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._firsts, number) - 1
        offset, num_bytes = self._spans[number].tolist()
        sample = number - self._firsts[shard]
        piece = self._files.read(shard, offset=offset, num_bytes=num_bytes, sample=sample)
        name = f"{self._shards[shard]} (sample {sample})"
        group = group_of(piece, name)
        if group.problem:
            raise DataError(
                f"the shard has changed or is damaged at {name}",
                remedy="delete its .index file, or prepare the data again",
                cause=group.problem,
            )
        return RawSample(group.key, group.parts[group.picture_extension], captions_of(group))


def merge_skipped(total: dict[str, tuple[int, str]], more: Mapping[str, tuple[int, str]]) -> None:
    """Add counts of skipped samples by cause, keeping the first key of each cause.

    Args:
        total: cause → (count, first key); changed in place.
        more: what to add.
    """
    for cause, (count, first) in more.items():
        before, earliest = total.get(cause, (0, first))
        total[cause] = (before + count, earliest)


def open_shards(
    paths: Sequence[str],
    *,
    part: str | None = None,
    cache_dir: str | None = None,
    say: Say | None = None,
    together: bool = False,
) -> ShardStore:
    """Open shards by folder, file or pattern; see `stores.open_samples`."""
    cache_dir = cache_dir or default_cache_dir()
    shards: list[str] = []
    digest = hashlib.sha256()
    for path in paths:
        for found, identity in _find(path, part or ""):
            shards.append(found)
            digest.update(identity.encode() + b"\0")
    indexes = load_indexes(shards, cache_dir=cache_dir, say=say, together=together)
    for shard, index in zip(shards, indexes, strict=True):
        digest.update(f"{os.path.basename(shard)}\0{index.tar_bytes}\0".encode())
        digest.update(index.spans.tobytes())
    store = ShardStore(shards, indexes, fingerprint=digest.hexdigest(), cache_dir=cache_dir)
    if not len(store):
        causes = "; ".join(f"{cause}: {n}, first {key}" for cause, (n, key) in store.skipped.items())
        raise DataError(f"no image-text pair in {', '.join(paths)} ({causes or 'empty'})", remedy=PREPARE)
    return store


def default_cache_dir() -> str:
    """Return `$DECLIP_CACHE`, else `~/.cache/declip`."""
    return os.environ.get("DECLIP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "declip")


def find_shards(path: str, *, part: str | None = None) -> list[str]:
    """List the shards that a folder, a file or a pattern means, in order.

    Args:
        path: local path or URL.
        part: as of `stores.open_samples`.

    Returns:
        Paths or URLs of tar archives; they exist.

    Raises:
        DataError: there are none.
    """
    return [shard for shard, _ in _find(path, part or "")]


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the manifest of a folder made by `declip prepare`.

    Args:
        folder: local path or URL; it has a manifest.

    Returns:
        What stands in it.

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
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}", remedy="run the same declip prepare with --force") from error


def _find(path: str, part: str) -> list[tuple[str, str]]:
    """Return (shard, what identifies its content) pairs."""
    folder = path if part in ("", "train") else storage.join(path, part)
    if storage.is_folder(folder):
        return _find_in_folder(folder)
    if folder != path:
        raise DataError(
            f"{path} has no part {part!r}", remedy=f"declip prepare SOURCE --out {path} --split {part}=0.01"
        )
    expanded = storage.expand(path)
    missing = [shard for shard in expanded if not storage.is_file(shard)]
    if missing or not expanded:
        raise DataError(
            f"no such shard: {(missing or [path])[0]} ({len(missing)} of {len(expanded)} are missing)",
            remedy="check the path; a folder, a .tar file or a pattern such as shards/{00000..00127}.tar",
        )
    wrong = next((shard for shard in expanded if not shard.endswith(".tar")), "")
    if wrong:
        raise DataError(f"{wrong} is not a .tar shard", remedy=PREPARE)
    return [(shard, "") for shard in expanded]


def _find_in_folder(folder: str) -> list[tuple[str, str]]:
    if storage.is_file(storage.join(folder, MANIFEST)):
        return _find_prepared(folder)
    names = [name for name in storage.names_in(folder) if name.endswith(".tar")]
    if not names:
        raise DataError(f"no .tar shards in the folder {folder}", remedy=PREPARE.replace("SOURCE", folder))
    return [(storage.join(folder, name), "") for name in names]


def _find_prepared(folder: str) -> list[tuple[str, str]]:
    found = []
    for shard in read_manifest(folder)["shards"]:
        path = storage.join(folder, shard["name"])
        expected = shard["num_bytes"]
        actual = storage.num_bytes(path) if storage.is_file(path) else -1
        if actual != expected:
            state = "is missing" if actual < 0 else f"has {actual:,} bytes instead of {expected:,}"
            raise DataError(f"the shard {path} {state}", remedy="copy it again, or prepare the data again")
        found.append((path, shard["sha256"]))
    return found
