"""A run folder: configuration, metrics, log, model and the state to go on from; each appears whole or not at all."""

import errno
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip_cli import __version__
from declip_cli.config import RunConfig
from declip_cli.config_files import build_config
from declip_cli.errors import TrainError

CONFIG_FILE = "config.json"
_STATE_FILE = "state.json"
_LIBRARIES = ("torch", "torchvision", "accelerate", "numpy", "opencv-python-headless", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What a run needs to go on as if it had never stopped."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Groups of named tensors, such as `method` and `optimizer`; one file each."""
    values: dict[str, Any]
    """Plain values, fit for JSON."""


def default_run_dir(root: Path, *, method: str, arch: str) -> Path:
    """Name a new run by method, architecture and time."""
    return root / f"{method}-{arch}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunDir:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_path = path / "model"

    def create(self, config: RunConfig, *, force: bool) -> None:
        """Make a new run folder.

        Args:
            config: written with the versions of the libraries.
            force: replace a run that is already there.

        Raises:
            TrainError: the folder exists and is not empty.
        """
        if self.path.exists() and not self._is_empty():
            if not force:
                raise TrainError(
                    f"the run folder {self.path} already holds files",
                    remedy=f"go on with it: declip pretrain --resume {self.path}; or choose another --out, or --force",
                )
            if not (self.path / CONFIG_FILE).is_file():
                raise TrainError(
                    f"{self.path} holds files but is no run folder, so --force does not delete it",
                    remedy="choose another --out",
                )
            shutil.rmtree(self.path)
        with full_disk_explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        """Write the settings with the versions of the libraries in use."""
        versions = {name: metadata.version(name) for name in _LIBRARIES}
        versions |= {"declip": __version__, "python": platform.python_version()}
        content = {"config": asdict(config), "versions": versions}
        with full_disk_explained(self.path):
            _write_text(self.path / CONFIG_FILE, json.dumps(content, indent=2) + "\n")

    def _is_empty(self) -> bool:
        """Tell whether nothing is lost by starting here: no files, or only those of a run that could not start."""
        return all(path.name == CONFIG_FILE for path in self.path.iterdir())

    def read_config(self) -> RunConfig:
        """Read back how the run was started.

        Raises:
            TrainError: there is no run here.
        """
        path = self.path / CONFIG_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainError(
                f"no run to resume at {self.path}: cannot read {path.name} ({error})",
                remedy="--resume takes the run folder that declip pretrain named when it started",
            ) from error
        config: RunConfig = build_config(RunConfig, content["config"])
        return config

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with full_disk_explained(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def append_log(self, line: str) -> None:
        """Add one line with the time to `log.txt`."""
        with full_disk_explained(self.path), (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop metrics of steps that will be taken again after a resume."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line without its end was cut off when the run was killed.
            _write_text(
                path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
            )

    def save_state(self, state: SavedState) -> None:
        """Write the state to go on from; older ones go when the new one is whole.

        Args:
            state: of this step.
        """
        folder = self.path / "state" / f"step-{state.step:09d}"
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with full_disk_explained(self.path):
                _write_state(state, temporary)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
        except TrainError:
            shutil.rmtree(temporary, ignore_errors=True)  # half a state only takes room
            raise
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def has_state(self) -> bool:
        """Tell whether there is a state to go on from."""
        return bool(self._states())

    def load_state(self) -> SavedState:
        """Read the newest whole state.

        Raises:
            TrainError: there is none, or it cannot be read.
        """
        states = self._states()
        if not states:
            raise TrainError(
                f"{self.path} has no saved state to resume from",
                remedy="start it again with --force; states are saved every train.checkpoint_every_minutes",
            )
        folder = states[-1]
        try:
            content = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainError(f"cannot read the saved state {folder}: {error}", remedy="delete it and resume") from error
        return SavedState(step=content["step"], tensors=tensors, values=content["values"])

    def _states(self) -> list[Path]:
        found = (self.path / "state").glob("step-*")
        return sorted(path for path in found if path.suffix != ".tmp" and (path / _STATE_FILE).is_file())


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into an error with a way out.

    Args:
        path: what is being written, for the message.

    Raises:
        TrainError: the disk is full or the folder is not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if is_full:
            message = f"the disk of {path} is full; the last whole state is kept"
            raise TrainError(message, remedy=f"free some space, then: declip pretrain --resume {path}") from error
        raise TrainError(f"cannot write to {path}: {error}", remedy="choose another folder with --out") from error


def _write_state(state: SavedState, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, tensors in state.tensors.items():
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(on_cpu, folder / f"{name}.safetensors")
    _write_text(folder / _STATE_FILE, json.dumps({"step": state.step, "values": state.values}))


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Flatten the state of optimizers into named tensors."""
    flat = {}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    flat[f"{number}.{index}.{key}"] = value
    return flat


def restore_optimizers(optimizers: list[torch.optim.Optimizer], flat: Mapping[str, Tensor]) -> None:
    """Put flattened tensors back into optimizers of the same build."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in flat.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
