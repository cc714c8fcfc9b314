"""Where each sample stands in a tar shard: a small file beside it, or in the cache if need be."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.shards import storage
from declip_cli.data.shards.tar_samples import read_groups
from declip_cli.errors import DataError
from declip_cli.files import parse_json

_FORMAT = b"declip-index 2 "


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
    """Write an index as bytes: format and sha256 of the rest, a line of JSON, the spans as little-endian int64."""
    head = {"tar_bytes": index.tar_bytes, "skipped": index.skipped}
    content = json.dumps(head).encode() + b"\n" + index.spans.astype("<i8").tobytes()
    return _FORMAT + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def decode_index(data: bytes) -> ShardIndex:
    """Read what `encode_index` wrote.

    Args:
        data: the bytes.

    Returns:
        The index; every span lies within the tar.

    Raises:
        ValueError: the bytes are not as they were written, or of another version.
    """
    line, _, content = data.partition(b"\n")
    if line != _FORMAT + hashlib.sha256(content).hexdigest().encode():
        raise ValueError("damaged" if line.startswith(_FORMAT) else "of another version")
    try:
        head_line, _, body = content.partition(b"\n")
        head = parse_json(head_line)
        spans = np.frombuffer(body, dtype="<i8").reshape(-1, 2).astype(np.int64)
        skipped = {cause: (int(count), str(first)) for cause, (count, first) in head["skipped"].items()}
        index = ShardIndex(spans, int(head["tar_bytes"]), skipped)
        is_within = not len(spans) or (spans.min() >= 0 and (spans[:, 0] <= index.tar_bytes - spans[:, 1]).all())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"damaged: {error}") from error
    if not is_within:
        raise ValueError("damaged: a sample behind the end of its tar")
    return index


def find_index(shard: str, *, cache_dir: str) -> tuple[ShardIndex | None, str]:
    """Read the index of a shard, if there is one for the shard as it is now.

    Args:
        shard: local path or URL of a tar archive.
        cache_dir: where the index may lie if not beside the shard.

    Returns:
        The index, None where it has to be made; and what is wrong with the file there is, empty if nothing.

    Raises:
        DataError: the shard is missing or cannot be read.
    """
    damage = ""
    try:
        tar_bytes = storage.num_bytes(shard)
        for path in _places(shard, cache_dir):
            if storage.is_file(path) and not _is_older(path, shard):
                try:
                    index = decode_index(storage.read_bytes(path))
                except ValueError as error:
                    damage = damage or f"{path} is {error}"
                else:
                    if index.tar_bytes == tar_bytes:
                        return index, ""
    except DataError:
        raise
    except storage.failures_of(shard) as error:
        raise DataError(f"cannot read the shard {shard}: {error}", remedy="check --data") from error
    return None, damage


def make_index(shard: str, *, cache_dir: str) -> ShardIndex:
    """Build the index of a shard and save it beside the shard, or in the cache where that cannot be.

    Args:
        shard: local path or URL of a tar archive.
        cache_dir: where the index goes if it cannot stand beside the shard.

    Returns:
        The index.

    Raises:
        DataError: the shard cannot be read, or the index can be written nowhere.
    """
    try:
        index = build_index(shard)
    except DataError:
        raise
    except storage.failures_of(shard) as error:
        raise DataError(f"cannot read the shard {shard}: {error}", remedy="check --data") from error
    beside, cached = _places(shard, cache_dir)
    data = encode_index(index)
    if not storage.is_remote(beside) and os.access(os.path.dirname(beside) or ".", os.W_OK):
        try:
            storage.write_whole(beside, data)
            return index
        except DataError:  # a full disk, or one mounted for reading only
            pass
    storage.make_folder(os.path.dirname(cached))
    storage.write_whole(cached, data)
    return index


def _places(shard: str, cache_dir: str) -> tuple[str, str]:
    """Name the index beside a shard, and in the cache."""
    address = shard if storage.is_remote(shard) else os.path.abspath(shard)
    name = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()
    return index_path(shard), os.path.join(cache_dir, "indexes", f"{name[:24]}.index")


def _is_older(path: str, shard: str) -> bool:
    if storage.is_remote(shard):
        return False
    return os.path.getmtime(path) < os.path.getmtime(shard)
