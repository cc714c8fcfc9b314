"""The output folder of `prepare`: new, interrupted, finished, or with other content."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from declip_cli import __version__
from declip_cli.data import storage
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.shards.files import lock_file
from declip_cli.data.shards.store import MANIFEST, default_cache_dir
from declip_cli.errors import DataError
from declip_cli.files import parse_json

UNFINISHED = "unfinished.tar.tmp"
"""The unfinished shard of each split, in the staging folder."""
START_OVER = "run the command again with --force to start over"
_PROGRESS, _MEMORY, _LOCK, _DOWNLOAD = "progress.json", "progress.memory", "progress.lock", "download"
_OURS = re.compile(
    r"(\d+\.tar|(\d+|shards)\.index|manifest\.json|progress\.(json|memory)|unfinished\.tar)(\.([0-9a-f]+\.)?tmp)?"
)
"""What `prepare` writes, also while it writes it."""
_DIGEST = "sha256"
_NOT_THE_COMMAND = ("out", "workers", "max_bad", "engine", "force")


def download_folder(out: str) -> str:
    """Name the local folder for what is downloaded on the way to an output folder."""
    return os.path.join(_staging_folder(out), _DOWNLOAD)


def _staging_folder(out: str) -> str:
    """Name the local folder for unfinished things: the output folder itself, or for a URL one in the cache."""
    if not storage.is_remote(out):
        return out.rstrip("/") or "/"
    name = hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:24]
    return os.path.join(default_cache_dir(), "prepare", name)


class OutFolder:
    """Where a run's shards, manifest and resume state lie.

    Raises:
        DataError: the folder holds something else and `config.force` is not set.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.path, self._staging = config.out.rstrip("/") or "/", _staging_folder(config.out)
        self._command = _command_id(config)
        self.progress: dict[str, Any] = {}
        """State of an interrupted run of the same command; empty for a new one."""
        self.manifest: dict[str, Any] = {}
        """Of a finished run of the same command; empty for any other."""
        self._splits_to_clear: set[str] = set()
        self._memory_digest = hashlib.sha256()
        manifest, progress = _read(storage.join(self.path, MANIFEST)), _read(self._at(_PROGRESS))
        if config.force:
            self._splits_to_clear = {"", *manifest.get("splits", {}), *progress.get("splits", {})}
        elif manifest.get("command") == self._command:
            self.manifest = manifest
        elif progress.get("command") == self._command:
            self.progress = progress
        elif manifest or progress or self._has_files():
            state = "holds an interrupted run of another command" if progress else "is not empty"
            raise DataError(
                f"the output folder {self.path} {'holds the result of another command' if manifest else state}",
                remedy="choose another --out, or --force to replace the shards in it",
            )

    def _at(self, name: str) -> str:
        return os.path.join(self._staging, name)

    def _has_files(self) -> bool:
        if storage.is_file(self.path):
            raise DataError(f"the output {self.path} is a file", remedy="name a folder with --out")
        return storage.is_folder(self.path) and any(name != _LOCK for name in storage.walk(self.path))

    def places(self, split: str) -> tuple[str, str]:
        """Name the folder of one split (empty: the training split), and the local one of its unfinished shard."""
        return (storage.join(self.path, split), self._at(split)) if split else (self.path, self._staging)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of this folder; clear it first if forced to, delete it if the run produced nothing.

        Raises:
            DataError: another run is at work here, or the disk cannot be written; a full disk's names what is left.
        """
        lock = self._lock()
        try:
            self._clear()
            yield
        except DataError as error:
            left = sorted(map(str, Path(self._staging).rglob(UNFINISHED)))
            if error.cause != storage.DISK_FULL or not left:
                raise
            size_mb = sum(map(os.path.getsize, left)) / 1e6
            raise DataError(
                f"{error.message}; the pairs since the last whole shard, {size_mb:,.1f} MB, are in {', '.join(left)}",
                remedy="free some space and run the same command again to continue; to give up, delete that file",
                cause=error.cause,
            ) from error
        finally:
            storage.remove_file(self._at(_LOCK))
            os.close(lock)
            with contextlib.suppress(OSError):
                os.rmdir(self._staging)

    def _lock(self) -> int:
        path = self._at(_LOCK)
        with storage.disk_errors(path):
            try:
                return lock_file(path, wait=False)
            except BlockingIOError as error:
                raise DataError(
                    f"another declip prepare is writing to {self.path}", remedy="wait for it, or choose another --out"
                ) from error

    def _clear(self) -> None:
        """Delete what `prepare` has written, and nothing else."""
        if self._splits_to_clear:
            shutil.rmtree(self._at(_DOWNLOAD), ignore_errors=True)
        for folder in {folder for split in self._splits_to_clear for folder in self.places(split)}:
            for name in filter(_OURS.fullmatch, storage.names_in(folder)):
                storage.remove_file(storage.join(folder, name))

    def save_progress(self, facts: dict[str, Any], memory: bytes) -> None:
        """Write down how far the run is.

        Args:
            facts: JSON, given back as `progress` when the run goes on.
            memory: what to append to the hashes seen so far.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        storage.make_folder(self._staging)
        with storage.disk_errors(self._at(_MEMORY)), open(self._at(_MEMORY), "ab") as file:
            file.write(memory)
            memory_bytes = file.tell()
        self._memory_digest.update(memory)
        memory_facts = {"memory_bytes": memory_bytes, "memory_sha256": self._memory_digest.hexdigest()}
        progress = {"command": self._command} | memory_facts | facts
        text = json.dumps({_DIGEST: _digest_of(progress)} | progress)
        storage.write_whole(self._at(_PROGRESS), text.encode())

    def load_memory(self) -> bytes:
        """Read the hashes seen before the interruption, cutting off those after the last saved progress.

        Raises:
            DataError: they are not what was saved.
        """
        path, data = self._at(_MEMORY), b""
        if os.path.exists(path):
            with storage.disk_errors(path), open(path, "r+b") as file:
                file.truncate(self.progress["memory_bytes"])
                data = file.read()
        self._memory_digest.update(data)
        if self._memory_digest.hexdigest() != self.progress.get("memory_sha256"):
            raise DataError(f"{path} is damaged", remedy=START_OVER)
        return data

    def finish(self, manifests: dict[str, dict[str, Any]]) -> None:
        """Write the manifests, split → manifest, that of the training split last; then delete the resume state.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        for split in sorted(manifests, reverse=True):
            folder, _ = self.places(split)
            storage.make_folder(folder)
            facts = {"declip_version": __version__, "command": self._command} | manifests[split]
            text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
            storage.write_whole(storage.join(folder, MANIFEST), text.encode())
        self.forget_progress()

    def forget_progress(self) -> None:
        """Delete the resume state and what was downloaded; errors as in `finish`."""
        for name in (_PROGRESS, _MEMORY):
            storage.remove_file(self._at(name))
        shutil.rmtree(self._at(_DOWNLOAD), ignore_errors=True)


def _read(path: str) -> dict[str, Any]:
    """Read a manifest or progress file; a damaged one is of no command."""
    if not storage.is_file(path):
        return {}
    try:
        value = parse_json(storage.read_bytes(path))
    except ValueError:
        return {"command": "damaged"}
    is_whole = isinstance(value, dict) and value.pop(_DIGEST, None) in (None, _digest_of(value))
    if is_whole and "parts" in value:  # the name in version 0.1
        value["splits"] = value.pop("parts")
    return value if is_whole else {"command": "damaged"}


def _command_id(config: PrepareConfig) -> str:
    """Identify what is prepared and how, apart from where to, how fast and how leniently."""
    facts = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_THE_COMMAND}
    if not storage.is_remote(config.source):
        facts["source"] = os.path.abspath(config.source)
    return _digest_of(facts)


def _digest_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
