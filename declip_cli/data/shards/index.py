"""Where each sample stands in a tar shard: a small file beside it, or in the cache if need be."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.shards import storage
from declip_cli.data.shards.tar_samples import read_groups
from declip_cli.errors import DataError

_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The samples of one shard."""

    spans: NDArray[np.int64]
    """Byte offset and number of bytes of each sample, headers included, (N, 2)."""
    tar_bytes: int
    skipped: Mapping[str, tuple[int, str]]
    """What is in the shard but in no sample: cause → (count, first key)."""


def index_path(shard: str) -> str:
    """Name the index file of a shard: `00000.index` beside `00000.tar`."""
    return shard.removesuffix(".tar") + ".index"


def build_index(shard: str) -> ShardIndex:
    """Find the samples of a shard by going through its headers.

    Args:
        shard: local path or URL of a tar archive.

    Returns:
        Its index; damage is in `skipped`.

    Raises:
        OSError: the shard cannot be read.
    """
    spans: list[tuple[int, int]] = []
    skipped: OrderedDict[str, tuple[int, str]] = OrderedDict()
    with storage.open_binary(shard) as file:
        for group in read_groups(file, shard, with_contents=False):
            if group.problem:
                count, first = skipped.get(group.problem, (0, group.key))
                skipped[group.problem] = (count + 1, first)
            else:
                spans.append((group.start, group.end - group.start))
    array = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return ShardIndex(array, storage.num_bytes(shard), dict(skipped))


def encode_index(index: ShardIndex) -> bytes:
    """Write an index as bytes: one line of JSON, then the spans as little-endian int64."""
    head = {"version": _VERSION, "tar_bytes": index.tar_bytes, "skipped": index.skipped}
    return json.dumps(head).encode() + b"\n" + index.spans.astype("<i8").tobytes()


def decode_index(data: bytes, name: str) -> ShardIndex:
    """Read what `encode_index` wrote.

    Args:
        data: the bytes.
        name: of the file, for messages.

    Returns:
        The index.

    Raises:
        DataError: this is no index, or one of another version.
    """
    line, _, body = data.partition(b"\n")
    try:
        head: dict[str, Any] = json.loads(line)
        if head["version"] != _VERSION:
            raise ValueError(f"version {head['version']}, expected {_VERSION}")
        spans = np.frombuffer(body, dtype="<i8").reshape(-1, 2).astype(np.int64)
        skipped = {cause: (int(count), str(first)) for cause, (count, first) in head["skipped"].items()}
        return ShardIndex(spans, int(head["tar_bytes"]), skipped)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not a shard index: {error}", remedy=f"delete {name}; it is made again") from error


def load_index(shard: str, *, cache_dir: str) -> ShardIndex:
    """Read the index of a shard, building it on first use.

    Args:
        shard: local path or URL of a tar archive.
        cache_dir: where the index goes if it cannot stand beside the shard.

    Returns:
        The index, for the shard as it is now.

    Raises:
        DataError: the shard is missing, or an index file is damaged.
    """
    try:
        tar_bytes = storage.num_bytes(shard)
    except OSError as error:
        raise DataError(f"cannot read the shard {shard}: {error}", remedy="check --data") from error
    beside = index_path(shard)
    name = hashlib.sha256(f"{shard if storage.is_remote(shard) else os.path.abspath(shard)}".encode()).hexdigest()
    cached = os.path.join(cache_dir, "indexes", f"{name[:24]}.index")
    for path in (beside, cached):
        if storage.is_file(path) and not _is_older(path, shard):
            index = decode_index(storage.read_bytes(path), path)
            if index.tar_bytes == tar_bytes:
                return index
    index = build_index(shard)
    _save(encode_index(index), beside, cached)
    return index


def _is_older(path: str, shard: str) -> bool:
    if storage.is_remote(shard):
        return False
    return os.path.getmtime(path) < os.path.getmtime(shard)


def _save(data: bytes, beside: str, cached: str) -> None:
    if not storage.is_remote(beside) and os.access(os.path.dirname(beside) or ".", os.W_OK):
        storage.write_whole(beside, data)
        return
    storage.make_folder(os.path.dirname(cached))
    storage.write_whole(cached, data)
