"""Pairs into numbered tar shards with their indexes; an unfinished shard can be taken up again."""

import io
import json
import os
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from declip_cli.data.prepare.stages import Pair
from declip_cli.data.prepare.state import UNFINISHED
from declip_cli.data.shards import storage
from declip_cli.data.shards.index import ShardIndex, encode_index, index_path
from declip_cli.data.shards.tar_format import TarWriter
from declip_cli.data.shards.tar_samples import read_groups
from declip_cli.errors import DataError


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
        self._spans: list[tuple[int, int]] = []
        self._file: BinaryIO | None = None
        self._writer = TarWriter(io.BytesIO())
        self._num_finished = sum(int(shard["num_pairs"]) for shard in self.shards)
        unfinished = state.get("unfinished", {"num_pairs": 0, "num_bytes": 0})
        if unfinished["num_pairs"]:
            self._take_up(unfinished)

    @property
    def num_pairs(self) -> int:
        """Pairs written so far."""
        return self._num_finished + len(self._spans)

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
            start, key = self._writer.num_bytes, f"{self.num_pairs:09d}"
            self._writer.add(f"{key}.jpg", pair.jpeg)
            self._writer.add(f"{key}.txt", pair.captions[0].encode())
            self._writer.add(f"{key}.json", _metadata(pair))
            self._spans.append((start, self._writer.num_bytes - start))
        if len(self._spans) < self._shard_samples:
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
        index = ShardIndex(np.array(self._spans, dtype=np.int64), num_bytes, {})
        storage.write_whole(index_path(path), encode_index(index))
        self.shards.append({"name": name, "num_pairs": len(self._spans), "num_bytes": num_bytes, "sha256": sha256})
        self._num_finished += len(self._spans)
        self._spans = []

    def state(self) -> dict[str, Any]:
        """Flush to disk and return what is needed to go on from here; errors as of `add`."""
        unfinished: dict[str, Any] = {"num_pairs": 0, "num_bytes": 0}
        if self._file is not None:
            with storage.disk_errors(self._temporary):
                self._file.flush()
            unfinished = {"num_pairs": len(self._spans), "num_bytes": self._writer.num_bytes}
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
        groups = read_groups(file, self._temporary, with_contents=False, has_end_mark=False)
        self._spans = [(group.start, group.end - group.start) for group in groups if not group.problem]
        self._writer = TarWriter(file)
        if len(self._spans) != unfinished["num_pairs"] or self._writer.sha256 != unfinished["sha256"]:
            file.close()
            raise DataError(f"the unfinished shard {self._temporary} is damaged", remedy=remedy)

    def _find_unfinished(self) -> None:
        """Undo the last step of a run that was killed after finishing a shard, before it could say so."""
        finished = storage.join(self._folder, f"{len(self.shards):05d}.tar")
        if not os.path.exists(self._temporary) and storage.is_file(finished):
            storage.make_folder(self._spool)
            storage.write_whole(self._temporary, storage.read_bytes(finished))


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
