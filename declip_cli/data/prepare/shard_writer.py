"""Pairs into numbered tar shards with their indexes; an unfinished shard can be resumed."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, BinaryIO

from declip_cli.data import storage
from declip_cli.data.prepare.process import Pair
from declip_cli.data.prepare.state import START_OVER, UNFINISHED
from declip_cli.data.shards.index import IndexBuilder, ShardIndex, index_groups, parse_indexes, write_indexes
from declip_cli.data.shards.indexing import index_path
from declip_cli.data.shards.store import JOINED
from declip_cli.errors import DataError

_THREADS = 16


def pack(files: Mapping[str, bytes], *, start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Lay files out as they stand in an archive, whose bytes depend on names and contents only, never on time or user.

    Args:
        files: name, at most 100 ASCII characters → content.
        start: where they go in the archive, in bytes.

    Returns:
        The bytes; and offset and size of each content in the archive.
    """
    pieces, spans = [], []
    for name, data in files.items():
        pieces += [_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        spans.append((start + tarfile.BLOCKSIZE, len(data)))
        start += sum(map(len, pieces[-3:]))
    return b"".join(pieces), spans


@lru_cache(maxsize=1)
def _blank_header() -> bytes:
    return tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _header(name: str, num_bytes: int) -> bytes:
    """Fill in what differs between files; `tobuf` for each would take a twentieth of all the time of `prepare`."""
    header = bytearray(_blank_header())
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % num_bytes
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


class SplitWriter:
    """Write one split of the data, shard after shard.

    Args:
        folder: local path or URL for the finished shards.
        staging: local folder for the unfinished one.
        shard_samples: pairs per shard.
        state: what `state` returned when the run was interrupted; empty starts over.
    """

    def __init__(self, folder: str, staging: str, *, shard_samples: int, state: dict[str, Any]) -> None:
        self._folder, self._staging, self._shard_samples = folder, staging, shard_samples
        self._temporary = os.path.join(staging, UNFINISHED)
        self.shards: list[dict[str, Any]] = list(state.get("shards", []))
        self._num_finished = sum(int(shard["num_pairs"]) for shard in self.shards)
        self._file: BinaryIO | None = None
        self._index, self._num_bytes, self._digest = IndexBuilder(), 0, hashlib.sha256()
        if state.get("unfinished", {}).get("num_pairs"):
            self._take_up(state["unfinished"])

    @property
    def num_pairs(self) -> int:
        """Pairs written so far."""
        return self._num_finished + len(self._index)

    def add(self, pair: Pair) -> bool:
        """Append a pair; return whether that finished a shard.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        with storage.disk_errors(self._temporary):
            if self._file is None:
                storage.make_folder(self._folder)
                storage.make_folder(self._staging)
                self._file = open(self._temporary, "wb")  # noqa: SIM115  (stays open)
            key = f"{self.num_pairs:09d}"
            text = pair.captions[0].encode()  # what loaders such as OpenCLIP's read
            files = {f"{key}.jpg": pair.jpeg, f"{key}.txt": text, f"{key}.json": _metadata(pair)}
            data, (image, _, metadata) = pack(files, start=self._num_bytes)
            self._write(self._file, data)
            self._index.add(key, image, metadata, is_json=True)
        if len(self._index) < self._shard_samples:
            return False
        self.finish_shard()
        return True

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    def finish_shard(self) -> None:
        """Turn the unfinished shard, if any, into a finished one; errors as in `add`."""
        if self._file is None:
            return
        with storage.disk_errors(self._temporary):
            self._write(self._file, bytes(2 * tarfile.BLOCKSIZE))
            self._file.close()
        name, num_pairs, num_bytes = f"{len(self.shards):05d}.tar", len(self._index), self._num_bytes
        path = storage.join(self._folder, name)
        storage.move_into_place(self._temporary, path)
        write_indexes(index_path(path), [self._index.build(name, num_bytes)])
        facts = {"name": name, "num_pairs": num_pairs, "num_bytes": num_bytes, "sha256": self._digest.hexdigest()}
        self.shards.append(facts)
        self._num_finished += num_pairs
        self._file, self._index, self._num_bytes, self._digest = None, IndexBuilder(), 0, hashlib.sha256()

    def join_indexes(self) -> str:
        """Write the indexes of all shards into one file, which costs a reader one request; errors as in `add`.

        Returns:
            Its digest; empty where shards of an interrupted run have indexes of an older version, and there is none.
        """
        paths = [index_path(storage.join(self._folder, str(shard["name"]))) for shard in self.shards]
        try:
            return write_indexes(storage.join(self._folder, JOINED), _read_all(paths))
        except (ValueError, FileNotFoundError):
            return ""

    def state(self) -> dict[str, Any]:
        """Flush to disk and return what is needed to go on from here; errors as in `add`."""
        if self._file is not None:
            with storage.disk_errors(self._temporary):
                self._file.flush()
        unfinished = {"num_pairs": len(self._index), "num_bytes": self._num_bytes, "sha256": self._digest.hexdigest()}
        return {"shards": self.shards, "unfinished": unfinished}

    def close(self) -> None:
        """Let go of the unfinished shard's file."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk; what matters has been flushed by `state`
                self._file.close()
            self._file = None

    def _take_up(self, unfinished: dict[str, Any]) -> None:
        finished = storage.join(self._folder, f"{len(self.shards):05d}.tar")
        try:
            if not os.path.exists(self._temporary) and storage.is_file(finished):
                # The run was killed after finishing this shard, before it could say so.
                storage.make_folder(self._staging)
                storage.write_whole(self._temporary, storage.read_bytes(finished))
            file = open(self._temporary, "r+b")  # noqa: SIM115  (stays open)
        except OSError as error:
            raise DataError(f"the unfinished shard {self._temporary} is missing", remedy=START_OVER) from error
        file.truncate(unfinished["num_bytes"])
        self._index = index_groups(file, self._temporary)
        self._index.skipped.clear()  # that it ends without a mark
        file.seek(0)
        self._digest = hashlib.file_digest(file, "sha256")
        self._file, self._num_bytes = file, file.tell()
        if len(self._index) != unfinished["num_pairs"] or self._digest.hexdigest() != unfinished["sha256"]:
            self.close()
            raise DataError(f"the unfinished shard {self._temporary} is damaged", remedy=START_OVER)


def _read_all(paths: list[str]) -> Iterator[ShardIndex]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), 4 * _THREADS):
            for data in pool.map(storage.read_bytes, paths[start : start + 4 * _THREADS]):
                yield from parse_indexes(data, check=True)


def _metadata(pair: Pair) -> bytes:
    (width, height), (original_width, original_height) = pair.size, pair.original_size
    facts = {"key": pair.key, "captions": pair.captions, "width": width, "height": height}
    facts |= {"original_width": original_width, "original_height": original_height}
    return json.dumps(facts, ensure_ascii=False).encode()
