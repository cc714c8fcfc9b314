"""Where images and captions lie in tar shards: one file of rows for any number of shards, mapped, never read whole."""

import hashlib
import json
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from declip_cli.data import storage
from declip_cli.data.dataset import Skips
from declip_cli.data.shards.tar_samples import caption_member, read_groups
from declip_cli.files import parse_json

_MAGIC = b"declipI3"
_TAIL_BYTES = 64 + 16  # sha256 of the table, its length, both in hexadecimal
_BLOCK = 512
_JSON_BIT = 1 << 31
_THREADS = 8
_ROW_BYTES = 20


class ShardIndex:
    """The N samples of one shard.

    Args:
        facts: what the table of a file says about the shard.
        body: rows as they stand in a file: images, captions, ends of keys, keys.
    """

    __slots__ = ("body", "captions", "digest", "images", "key_ends", "keys", "name", "num", "skipped", "tar_bytes")

    def __init__(self, facts: Mapping[str, Any], body: NDArray[np.uint8]) -> None:
        self.name, self.digest = str(facts["name"]), str(facts["sha256"])
        self.num, self.tar_bytes = int(facts["num"]), int(facts["tar_bytes"])
        self.skipped = {cause: (int(count), str(first)) for cause, (count, first) in facts["skipped"].items()}
        rows = body[: self.num * _ROW_BYTES].view("<u4")
        self.body, self.keys, self.key_ends = body, body[self.num * _ROW_BYTES :], rows[4 * self.num :]
        self.images = rows[: 2 * self.num].reshape(self.num, 2)
        """Offset in units of 512 bytes and size in bytes of each image, (N, 2)."""
        self.captions = rows[2 * self.num : 4 * self.num].reshape(self.num, 2)
        """The same of the member with the captions, (N, 2); the top bit of the size says that it is JSON."""

    def __len__(self) -> int:
        return self.num

    @property
    def facts(self) -> dict[str, Any]:
        """What the table of a file says about the shard."""
        names = ("name", "num", "tar_bytes", "skipped")
        return {name: getattr(self, name) for name in names} | {"num_bytes": len(self.body), "sha256": self.digest}

    def check(self) -> None:
        """Compare the rows with their digest.

        Raises:
            ValueError: they have changed, or an image or a caption lies behind the end of its tar.
        """
        if hashlib.sha256(self.body.data).hexdigest() != self.digest:
            raise ValueError("damaged: rows have changed")
        for spans in (self.images, self.captions):
            ends = spans[:, 0].astype(np.int64) * _BLOCK + (spans[:, 1] & np.uint32(_JSON_BIT - 1))
            if (ends > self.tar_bytes).any():
                raise ValueError("damaged: a sample behind the end of its tar")

    def image_span(self, row: int) -> tuple[int, int]:
        """Return first byte and byte behind the last of a sample's image."""
        start, size = self.images[row].tolist()
        return start * _BLOCK, start * _BLOCK + size

    def caption_span(self, row: int) -> tuple[int, int, bool]:
        """Return first byte and byte behind the last of a sample's captions, and whether they are in JSON."""
        start, size = self.captions[row].tolist()
        return start * _BLOCK, start * _BLOCK + (size & ~_JSON_BIT), bool(size & _JSON_BIT)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return first byte and byte behind the last of consecutive samples, both ends included."""
        start = min(self.image_span(first)[0], self.caption_span(first)[0])
        return start, max(self.image_span(last)[1], self.caption_span(last)[1])

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")


class IndexBuilder:
    """Collect the rows of a shard that is written or gone through."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []
        self._keys: list[bytes] = []
        self.skipped = Skips()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, image: tuple[int, int], caption: tuple[int, int], *, is_json: bool) -> None:
        """Add a sample by its key and the offset and size, in bytes, of its image and of its captions."""
        rest = (caption[0] // _BLOCK, caption[1] | (_JSON_BIT if is_json else 0))
        self._rows.append((image[0] // _BLOCK, image[1], *rest))
        self._keys.append(key.encode("utf-8", "replace"))

    def build(self, name: str, tar_bytes: int) -> ShardIndex:
        """Make the index of the shard, of which the size is known now."""
        rows = np.array(self._rows, dtype="<u4").reshape(-1, 4)
        ends = np.cumsum([len(key) for key in self._keys], dtype="<u4")
        body = rows[:, :2].tobytes() + rows[:, 2:].tobytes() + ends.tobytes() + b"".join(self._keys)
        body += bytes(-len(body) % 8)
        facts = {"name": name, "num": len(self), "tar_bytes": tar_bytes, "skipped": dict(self.skipped)}
        facts["sha256"] = hashlib.sha256(body).hexdigest()
        return ShardIndex(facts, np.frombuffer(body, np.uint8))


def index_groups(file: BinaryIO, shard: str) -> IndexBuilder:
    """Find the samples of a shard, open at its start, by going through its headers; damage is in `skipped`.

    Raises:
        OSError: the shard cannot be read.
    """
    builder = IndexBuilder()
    for group in read_groups(file, shard, with_images=False):
        if group.problem:
            builder.skipped.add(group.problem, group.key)
        else:
            member = caption_member(group)
            spans = group.spans[group.image_extension], group.spans[member]
            builder.add(group.key, *spans, is_json=member == "json")
    return builder


def write_indexes(path: str, indexes: Iterable[ShardIndex]) -> str:
    """Write the indexes of shards, one behind the other, so that the file appears whole or not at all.

    Args:
        path: local path or URL; its folder exists.
        indexes: of the shards, in their order.

    Returns:
        Sha256 of what is in it.

    Raises:
        DataError: it cannot be written.
    """
    local = os.path.join(tempfile.gettempdir(), os.path.basename(path)) if storage.is_remote(path) else path
    temporary, table = f"{local}.{secrets.token_hex(6)}.tmp", []
    try:
        with storage.disk_errors(path), open(temporary, "wb") as file:
            file.write(_MAGIC)
            for index in indexes:
                file.write(index.body.data)
                table.append(index.facts)
            text = json.dumps(table).encode()
            digest = hashlib.sha256(text).hexdigest()
            file.write(text + digest.encode() + b"%016x" % len(text))
            file.flush()
            os.fsync(file.fileno())
        storage.move_into_place(temporary, path)
    finally:
        with suppress(OSError):
            os.remove(temporary)
    return digest


def read_indexes(path: str, *, check: bool) -> list[ShardIndex]:
    """Map a local file of indexes, of which rows stay on the disk until they are looked at.

    Raises:
        OSError: there is no such file.
        ValueError: as in `parse_indexes`.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("damaged: empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return parse_indexes(mapped, check=check)
    finally:
        mapped.madvise(mmap.MADV_DONTNEED)  # what was checked need not stay in memory


def parse_indexes(data: bytes | mmap.mmap, *, check: bool) -> list[ShardIndex]:
    """Read what `write_indexes` wrote.

    Args:
        data: the content of a file.
        check: compare all rows with their digest, too; else only the table of the shards.

    Returns:
        One index per shard; where checked, every image and caption lies within its tar.

    Raises:
        ValueError: it is not as it was written, or of another version.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("of another version" if data[:6] == _MAGIC[:6] else "damaged")
    try:
        found, at, rows = [], len(_MAGIC), np.frombuffer(data, np.uint8)
        for facts in _read_table(data):
            found.append(ShardIndex(facts, rows[at : (at := at + facts["num_bytes"])]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"damaged: {error}") from error
    if check:
        with ThreadPoolExecutor(min(_THREADS, max(1, len(found)))) as pool:
            list(pool.map(ShardIndex.check, found))
    return found


def _read_table(data: bytes | mmap.mmap) -> list[dict[str, Any]]:
    length = int(data[-16:], 16)
    if not 0 <= length <= len(data) - _TAIL_BYTES - len(_MAGIC):
        raise ValueError("cut off")
    text = data[-_TAIL_BYTES - length : -_TAIL_BYTES]
    if hashlib.sha256(text).hexdigest().encode() != data[-_TAIL_BYTES:-16]:
        raise ValueError("the table of the shards has changed")
    table: list[dict[str, Any]] = parse_json(text)
    if sum(facts["num_bytes"] for facts in table) + length + _TAIL_BYTES + len(_MAGIC) != len(data):
        raise ValueError("something was added or is missing")
    return table
