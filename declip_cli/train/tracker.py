"""A run's reports in TensorBoard, W&B or MLflow, through Accelerate; all sessions of a run go into one record."""

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from declip_cli.errors import TrainError
from declip_cli.train.build import Training

_PROJECT = "declip"
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_REMEDIES = {"wandb": "wandb login, or export WANDB_MODE=offline", "mlflow": "check MLFLOW_TRACKING_URI"}


class Tracker:
    """Hands reports to what `train.tracker` names; on rank 0 only.

    W&B and MLflow begin when this is made, so that a run they refuse leaves no run folder behind. TensorBoard's files
    lie in the run folder, so they begin with the first report.

    What a session logged after the step that the next one goes on from is cut in TensorBoard. W&B and MLflow cannot
    delete; there the steps that are taken again get a second point.

    Args:
        training: the run, restored if it is resumed.
        path: the run folder.
        settings: what is recorded of the configuration, flat.

    Raises:
        TrainError: the tracker cannot start.
    """

    def __init__(self, training: Training, path: Path, settings: Mapping[str, Any]) -> None:
        self._training, self._path, self._settings = training, path, settings
        self._name = str(training.config.train.tracker)
        self._first_step, self._is_started = training.step + 1, False
        try:
            importlib.import_module(_PACKAGES[self._name])
            if self._name != "tensorboard":
                self._start()
        except Exception as error:  # whatever the tracker's package raises
            raise TrainError(
                f"cannot start the tracker {self._name}: {error}",
                remedy=_REMEDIES.get(self._name, f"pip install 'declip[{self._name}]', or leave out train.tracker"),
            ) from error

    def _start(self) -> None:
        training, known = self._training, self._training.tracked_runs
        name, identity = self._path.resolve().name, known.get(self._name)
        settings: dict[str, Any] | None = dict(self._settings)
        options: dict[str, Any] = {}
        if self._name == "tensorboard":
            options = {"purge_step": self._first_step}
        elif self._name == "wandb":
            known["wandb"] = identity or secrets.token_hex(8)
            options = {"id": known["wandb"], "resume": "allow", "name": name}
        else:
            options = {"run_id": identity, "run_name": name}
            settings = settings if identity is None else None  # MLflow's never change
        project = "tensorboard" if self._name == "tensorboard" else _PROJECT  # the name of a folder, or of a project
        training.accelerator.init_trackers(project, config=settings, init_kwargs={self._name: options})
        self._is_started = True
        if self._name == "wandb":  # whose own count of steps takes none that lies before its last
            training.accelerator.get_tracker("wandb", unwrap=True).define_metric("*", step_metric="step")
        elif self._name == "mlflow":
            known["mlflow"] = training.accelerator.get_tracker("mlflow", unwrap=True).info.run_id

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers by name."""
        if not self._is_started:
            self._start()
        if self._name == "wandb":
            self._training.accelerator.log({**values, "step": step})
        else:
            self._training.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        for tracker in self._training.accelerator.trackers:
            tracker.finish()
