"""A run folder: configuration, metrics, log, model and the states to resume from; each appears whole or not at all."""

import errno
import fcntl
import functools
import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip_cli import __version__
from declip_cli.errors import ConfigError, TrainError
from declip_cli.files import check_folder, existing_folder, new_folder, parse_json, write_text
from declip_cli.resolve import ResolvedRun, resolved_from_json

CONFIG_FILE = "config.json"
_FORMAT = 2
_STATE_FILE = "state.json"
_LOCK_FILE = "lock"
_BEST_FILE = "best.json"
_LIBRARIES = ("torch", "torchvision", "accelerate", "numpy", "opencv-python-headless", "safetensors")
_STATE_NAME = re.compile(r"step-\d+(\.old)?")
_HEADROOM = 1.02
"""Room that a state takes beyond its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What a run needs to continue as if it had never stopped."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Groups of named tensors, such as `method` and `optimizer`; one file each."""
    values: dict[str, Any]
    """Plain values, fit for JSON."""

    @property
    def samples_seen(self) -> int:
        """Pairs the run has seen."""
        return int(self.values["samples_seen"])


def default_run_dir(root: Path, *, method: str, arch: str) -> Path:
    """Name a new run by method, architecture and time."""
    return root / f"{method}-{arch}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunDir:
    """The files of one run; `log` receives a note when something damaged was skipped."""

    def __init__(self, path: Path, log: Callable[[str], None] = lambda message: None) -> None:
        self.path = path
        self.model_path = path / "model"
        self.best_path = path / "best"
        self.log = log
        self.saved_step: int | None = None
        """Of the newest state that was saved here by this process."""

    def claim(self, *, force: bool) -> None:
        """Make the folder of a new run empty, `force` one that holds a run, too; call it with the folder locked.

        Raises:
            TrainError: the folder holds files.
        """
        self.check_free(force=force)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:  # it is held
                path.unlink()

    def check_free(self, *, force: bool) -> None:
        """Raise TrainError where `claim` would."""
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        if names <= {CONFIG_FILE, _LOCK_FILE}:
            return  # nothing is lost: no files, or only those of a run that could not start
        if not force:
            raise TrainError(
                f"the run folder {self.path} already holds files",
                remedy=f"resume it: declip pretrain --resume {self.path}; or choose another --out, or --force",
            )
        if not (self.path / CONFIG_FILE).is_file():
            raise TrainError(
                f"{self.path} holds files but is not a run folder, so --force does not delete it",
                remedy="choose another --out",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be and keep other processes from writing to it, until the block or this process ends.

        Raises:
            TrainError: another process writes to it.
        """
        with full_disk_explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / _LOCK_FILE).open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainError(
                    f"another process is training in {self.path}",
                    remedy="wait for it, stop it, or choose another --out",
                ) from error
            except OSError:
                self.log(f"note: the file system of {self.path} has no locks: make sure that nothing else writes there")
            yield

    def write_run(self, run: ResolvedRun) -> None:
        """Write what the run does, with the versions of the libraries in use."""
        with full_disk_explained(self.path):
            write_text(self.path / CONFIG_FILE, _run_to_text(run))

    def read_run(self) -> ResolvedRun:
        """Read what the run does; from its newest state where the file beside the states is damaged.

        Raises:
            TrainError: there is no run here.
        """
        first: Exception | None = None
        for path in (self.path / CONFIG_FILE, *(state / CONFIG_FILE for state in reversed(self._states()))):
            try:
                content = parse_json(path.read_bytes())
                if content["format"] != _FORMAT:
                    raise ValueError(f"format {content['format']}, this declip reads {_FORMAT}")
                run = resolved_from_json(content)
                if _digest_of_run(content) != content["sha256"]:
                    raise ValueError("it was changed after it was written: pass changes as options instead")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
                first = first or error
                continue
            if first is not None:
                self.log(f"note: {self.path / CONFIG_FILE} is damaged ({first}); taken from {path.parent.name} instead")
            return run
        raise TrainError(
            f"no run to resume at {self.path}: cannot read {CONFIG_FILE} ({first})",
            remedy="--resume takes the run folder that declip pretrain named when it started",
        ) from first

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with full_disk_explained(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def append_log(self, line: str) -> None:
        """Add one line with the time to `log.txt`."""
        with full_disk_explained(self.path), (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop metrics of steps that will be taken again, and lines that were not written whole."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept, num_damaged = [], 0
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line end was cut off by a kill
            try:
                if parse_json(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                num_damaged += 1
        if num_damaged:
            self.log(f"note: {num_damaged} damaged lines of {path} are dropped")
        with full_disk_explained(self.path):
            write_text(path, b"".join(kept).decode())

    def save_state(self, state: SavedState, run: ResolvedRun, *, keep: int) -> None:
        """Write a state to resume from, the run's settings beside it; all but the newest `keep` go when it is whole.

        Raises:
            TrainError: the disk is full; the states before are untouched.
        """
        self._make_room(sum(value.nbytes for group in state.tensors.values() for value in group.values()))
        folder = self.path / "state" / f"step-{state.step:09d}"
        with full_disk_explained(self.path), new_folder(folder) as new:
            for name, tensors in state.tensors.items():
                on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(on_cpu, new / f"{name}.safetensors")
            content = {"step": state.step, "values": state.values}
            (new / _STATE_FILE).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
            (new / CONFIG_FILE).write_text(_run_to_text(run), encoding="utf-8")
        self.saved_step = state.step
        for other in self._states()[:-keep]:
            shutil.rmtree(other, ignore_errors=True)

    def _make_room(self, num_bytes: int) -> None:
        """Make sure that a state fits on the disk, if need be by deleting all but the newest."""
        missing = num_bytes * _HEADROOM - shutil.disk_usage(self.path).free
        for oldest in self._states()[:-1]:
            size = sum(path.stat().st_size for path in oldest.iterdir())
            if 0 < missing <= size:
                shutil.rmtree(oldest, ignore_errors=True)
                missing -= size
        if missing > 0:
            raise self._full_disk(f"a state takes {num_bytes / 2**20:,.0f} MiB")

    def _full_disk(self, why: str) -> TrainError:
        states = self._states()
        kept = f"the last whole state is kept ({states[-1].name})" if states else "no state is saved yet"
        return TrainError(
            f"the disk of {self.path} is full: {why}; {kept}",
            remedy=f"free some space, then: declip pretrain --resume {self.path}",
        )

    def has_state(self) -> bool:
        """Return whether there is a state to go on from."""
        return bool(self._states())

    def load_state(self, *, before: int | None = None) -> SavedState:
        """Read the newest whole state, `before` some step; a damaged one is skipped with a note.

        Raises:
            TrainError: there is none, or none can be read.
        """
        states = [path for path in self._states() if before is None or _step_of(path) < before]
        damage: list[str] = []
        for folder in reversed(states):
            try:
                state = _read_state(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                damage.append(f"the saved state {folder} is damaged ({error})")
                continue
            for words in damage:
                self.log(f"note: {words}; resuming from {folder.name} instead")
            return state
        raise TrainError(
            "; ".join(damage) or f"{self.path} has no saved state to resume from",
            remedy=f"start again in another folder: declip pretrain --config {self.path / CONFIG_FILE} --out …",
        )

    def _states(self) -> list[Path]:
        """List the states, oldest first; one that was being replaced when the run was killed counts."""
        paths = (path for path in (self.path / "state").glob("step-*") if _STATE_NAME.fullmatch(path.name))
        found = {existing_folder(path.with_suffix("")) for path in paths}
        return sorted((path for path in found if (path / _STATE_FILE).is_file()), key=_step_of)

    def read_best(self, key: str) -> float | None:
        """Read the best score so far; None where there is none, or one of another kind."""
        try:
            content = parse_json((self.path / _BEST_FILE).read_bytes())
            return float(content["score"]) if content["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_best(self, *, key: str, score: float, step: int) -> None:
        """Write down which score the model in `best/` has."""
        with full_disk_explained(self.path):
            write_text(self.path / _BEST_FILE, json.dumps({"key": key, "score": score, "step": step}) + "\n")


@functools.cache
def _versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return versions | {"declip": __version__, "python": platform.python_version()}


def _run_to_text(run: ResolvedRun) -> str:
    content = {"format": _FORMAT} | run.to_json() | {"versions": _versions()}
    return json.dumps(content | {"sha256": _digest_of_run(content)}, indent=2, allow_nan=False) + "\n"


def _digest_of_run(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a run's settings and facts, whatever the layout of the file."""
    settled = json.dumps([content[key] for key in ("asked", "config", "run")], sort_keys=True)
    return hashlib.sha256(settled.encode()).hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".old"))


def _read_state(folder: Path) -> SavedState:
    check_folder(folder)
    content = parse_json((folder / _STATE_FILE).read_bytes())
    tensors = {
        path.stem: {_new_name(name): value for name, value in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }
    values = content["values"]
    if "trained" in values:
        values["trained"] = [_new_name(name) for name in values["trained"]]
    return SavedState(step=content["step"], tensors=tensors, values=values)


def _new_name(name: str) -> str:
    """Translate the name that a tensor has in the states of version 0.1; to be removed with the next version."""
    return re.sub(r"^(queue\.)?numbers$", r"\1pair_indices", re.sub(r"^mask_head\.", "mlm_head.", name))


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn a full disk, or a run folder that cannot be written, into an error with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RunDir(path)._full_disk("a file could not be written") from error
        raise TrainError(f"cannot write to {path}: {error}", remedy="choose another folder with --out") from error
