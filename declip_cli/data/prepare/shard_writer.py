"""Pairs into numbered tar shards with their indexes; an unfinished shard can be taken up again."""

import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from declip_cli.data import storage
from declip_cli.data.prepare.stages import Pair
from declip_cli.data.prepare.state import UNFINISHED
from declip_cli.data.shards.index import IndexBuilder, ShardIndex, index_groups, parse_indexes, write_indexes
from declip_cli.data.shards.indexing import index_path
from declip_cli.data.shards.store import JOINED
from declip_cli.errors import DataError
from declip_cli.files import digest_of

_THREADS = 16


def append_file(tar: BinaryIO, name: str, data: bytes) -> tuple[int, int]:
    """Append a file to an archive, whose bytes depend on names and contents only, never on time or user.

    Args:
        tar: open for writing, at its end.
        name: of the file, at most 100 ASCII characters.
        data: its content.

    Returns:
        Offset and size of the content in the archive, in bytes.
    """
    start = tar.tell() + tar.write(_header(name, len(data)))
    tar.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return start, len(data)


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
                self._file = open(self._temporary, "wb")  # noqa: SIM115  (stays open)
            key = f"{self.num_pairs:09d}"
            image = append_file(self._file, f"{key}.jpg", pair.jpeg)
            append_file(self._file, f"{key}.txt", pair.captions[0].encode())  # what loaders such as OpenCLIP's read
            self._index.add(key, image, append_file(self._file, f"{key}.json", _metadata(pair)), is_json=True)
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
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            num_bytes = self._file.tell()
            self._file.close()
            sha256 = digest_of(Path(self._temporary))
        self._file = None
        path = storage.join(self._folder, name)
        storage.move_into_place(self._temporary, path)
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
                unfinished = {"num_pairs": len(self._index), "num_bytes": self._file.tell()}
                unfinished["sha256"] = digest_of(Path(self._temporary))
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
        self._index = index_groups(file, self._temporary)
        self._index.skipped.clear()  # that it ends without a mark
        file.seek(0, os.SEEK_END)
        digest = digest_of(Path(self._temporary))
        if len(self._index) != unfinished["num_pairs"] or digest != unfinished["sha256"]:
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
