"""Pairs into numbered tar shards with their indexes; an unfinished shard can be taken up again."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

from declip_cli.data import storage
from declip_cli.data.prepare.stages import Pair
from declip_cli.data.prepare.state import UNFINISHED
from declip_cli.data.shards.index import IndexBuilder, ShardIndex, index_groups, parse_indexes, write_indexes
from declip_cli.data.shards.indexing import index_path
from declip_cli.data.shards.store import JOINED
from declip_cli.errors import DataError

_THREADS = 16


class TarWriter:
    """Write an archive whose bytes depend on names and contents only, never on time or user.

    Args:
        file: open for reading and writing; what is in it already is kept and written behind.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        file.seek(0)
        while block := file.read(1 << 20):
            self._digest.update(block)
            self.num_bytes += len(block)

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one file; return offset and size of its content, in bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        span = self.num_bytes + tarfile.BLOCKSIZE, len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return span

    def finish(self) -> str:
        """Write the end mark, and return the sha256 of the whole archive, in hexadecimal."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self.sha256

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


class PartWriter:
    """Write one part of the data, shard after shard.

    Args:
        folder: local path or URL for the finished shards.
        spool: local folder for the unfinished one.
        shard_samples: pairs per shard.
        state: what `state` returned when the run was interrupted; empty starts anew.
    """

    def __init__(self, folder: str, spool: str, *, shard_samples: int, state: dict[str, Any]) -> None:
        self._folder, self._spool, self._shard_samples = folder, spool, shard_samples
        self.shards: list[dict[str, Any]] = list(state.get("shards", []))
        self._index = IndexBuilder()
        self._file: BinaryIO | None = None
        self._writer: TarWriter
        self._num_finished = sum(int(shard["num_pairs"]) for shard in self.shards)
        unfinished = state.get("unfinished", {"num_pairs": 0, "num_bytes": 0})
        if unfinished["num_pairs"]:
            self._take_up(unfinished)

    @property
    def num_pairs(self) -> int:
        """Pairs written so far."""
        return self._num_finished + len(self._index)

    @property
    def num_shards(self) -> int:
        """Shards finished so far."""
        return len(self.shards)

    def add(self, pair: Pair) -> bool:
        """Append a pair.

        Args:
            pair: what to write.

        Returns:
            True if that finished a shard.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        with storage.disk_errors(self._temporary):
            if self._file is None:
                storage.make_folder(self._folder)
                storage.make_folder(self._spool)
                self._file = open(self._temporary, "w+b")  # noqa: SIM115  (stays open)
                self._writer = TarWriter(self._file)
            key = f"{self.num_pairs:09d}"
            image = self._writer.add(f"{key}.jpg", pair.jpeg)
            self._writer.add(f"{key}.txt", pair.captions[0].encode())
            self._index.add(key, image, self._writer.add(f"{key}.json", _metadata(pair)), is_json=True)
        if len(self._index) < self._shard_samples:
            return False
        self.finish_shard()
        return True

    def finish_shard(self) -> None:
        """Turn the unfinished shard, if any, into a finished one; errors as of `add`."""
        if self._file is None:
            return
        name = f"{len(self.shards):05d}.tar"
        with storage.disk_errors(self._temporary):
            sha256 = self._writer.finish()
            self._file.close()
        self._file = None
        path = storage.join(self._folder, name)
        storage.move_into_place(self._temporary, path)
        num_bytes = self._writer.num_bytes
        write_indexes(index_path(path), [self._index.build(name, num_bytes)])
        self.shards.append({"name": name, "num_pairs": len(self._index), "num_bytes": num_bytes, "sha256": sha256})
        self._num_finished += len(self._index)
        self._index = IndexBuilder()

    def join_indexes(self) -> str:
        """Write the indexes of all shards into one file, which costs a reader one request; errors as of `add`.

        Returns:
            Its digest; empty where shards of an interrupted run have indexes of an older version, and there is none.
        """
        paths = [index_path(storage.join(self._folder, str(shard["name"]))) for shard in self.shards]
        try:
            return write_indexes(storage.join(self._folder, JOINED), _read_all(paths))
        except (ValueError, FileNotFoundError):
            return ""

    def state(self) -> dict[str, Any]:
        """Flush to disk and return what is needed to go on from here; errors as of `add`."""
        unfinished: dict[str, Any] = {"num_pairs": 0, "num_bytes": 0}
        if self._file is not None:
            with storage.disk_errors(self._temporary):
                self._file.flush()
            unfinished = {"num_pairs": len(self._index), "num_bytes": self._writer.num_bytes}
            unfinished["sha256"] = self._writer.sha256
        return {"shards": self.shards, "unfinished": unfinished}

    def close(self) -> None:
        """Let go of the unfinished shard's file."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk; what matters has been flushed by `state`
                self._file.close()
            self._file = None

    @property
    def _temporary(self) -> str:
        return os.path.join(self._spool, UNFINISHED)

    def _take_up(self, unfinished: dict[str, Any]) -> None:
        remedy = "run the command again with --force to start anew"
        try:
            self._find_unfinished()
            file = open(self._temporary, "r+b")  # noqa: SIM115  (stays open)
        except OSError as error:
            raise DataError(f"the unfinished shard {self._temporary} is missing", remedy=remedy) from error
        file.truncate(unfinished["num_bytes"])
        self._file = file
        file.seek(0)
        self._index = index_groups(file, self._temporary)
        self._index.skipped.clear()  # that it ends without a mark
        self._writer = TarWriter(file)
        if len(self._index) != unfinished["num_pairs"] or self._writer.sha256 != unfinished["sha256"]:
            file.close()
            raise DataError(f"the unfinished shard {self._temporary} is damaged", remedy=remedy)

    def _find_unfinished(self) -> None:
        """Undo the last step of a run that was killed after finishing a shard, before it could say so."""
        finished = storage.join(self._folder, f"{len(self.shards):05d}.tar")
        if not os.path.exists(self._temporary) and storage.is_file(finished):
            storage.make_folder(self._spool)
            storage.write_whole(self._temporary, storage.read_bytes(finished))


def _read_all(paths: list[str]) -> Iterator[ShardIndex]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), 4 * _THREADS):
            for data in pool.map(storage.read_bytes, paths[start : start + 4 * _THREADS]):
                yield from parse_indexes(data, check=True)


def _metadata(pair: Pair) -> bytes:
    facts = {
        "key": pair.key,
        "captions": pair.captions,
        "width": pair.width,
        "height": pair.height,
        "original_width": pair.original_width,
        "original_height": pair.original_height,
    }
    return json.dumps(facts, ensure_ascii=False).encode()
