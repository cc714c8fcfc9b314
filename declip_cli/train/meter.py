"""Count and time steps; sums stay on the device until somebody asks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.batch import LossTerms
from declip_cli.distributed import world_size
from declip_cli.train.health import check_finite
from declip_cli.train.setup import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """How a run stands after some step."""

    step: int
    total_steps: int
    samples_seen: int
    seconds: float
    """Since the run began, interruptions left out."""
    seconds_left: float
    samples_per_second: float
    """Since the last report."""
    wait_share: float
    """Share of the time since the last report spent waiting for data, in [0, 1]."""
    learning_rate: float
    logit_scale: float
    """Exponentiated."""
    losses: dict[str, float]
    """Mean over ranks and over the steps since the last report; `total` is the weighted sum."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Unreadable samples on this rank: cause → (number, first key)."""
    is_last: bool = False
    was_stopped: bool = False
    """Whether somebody asked to stop before the end."""


class Meter:
    """Collect loss terms and times between two reports.

    Args:
        training: whose steps are counted.
        run_dir: named in errors.
    """

    def __init__(self, training: Training, *, run_dir: str) -> None:
        self._training = training
        self._run_dir = run_dir
        self._began = time.monotonic() - training.seconds
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._restart()

    def _restart(self) -> None:
        self._last_time = time.monotonic()
        self._last_samples = self._training.samples_seen
        self._last_wait = self._training.stream.wait_seconds

    def seconds(self) -> float:
        """Return the time since the run began, interruptions left out."""
        return time.monotonic() - self._began

    def add(self, terms: LossTerms) -> None:
        """Take in one step's losses, without waiting for the device."""
        values = terms.terms | {"total": terms.total}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._num_steps += 1

    def report(
        self, *, rate: float, schedule_share: float, evaluations: Mapping[str, dict[str, Any]], **flags: bool
    ) -> StepReport:
        """Sum up what happened since the last report and start over.

        Args:
            rate: the learning rate in use.
            schedule_share: how much of the run is done, in (0, 1].
            evaluations: scores taken at this step.
            flags: `is_last`, `was_stopped`.

        Returns:
            The report, the same on every rank but for its times.
        """
        training = self._training
        elapsed = max(1e-9, time.monotonic() - self._last_time)
        seconds = self.seconds()
        training.seconds = seconds
        report = StepReport(
            step=training.step,
            total_steps=training.total_steps,
            samples_seen=training.samples_seen,
            seconds=seconds,
            seconds_left=seconds / schedule_share - seconds,
            samples_per_second=(training.samples_seen - self._last_samples) / elapsed,
            wait_share=min(1.0, (training.stream.wait_seconds - self._last_wait) / elapsed),
            learning_rate=rate,
            logit_scale=float(training.method.encoder.logit_scale.detach().exp()),
            losses=self.losses(),
            evaluations=dict(evaluations),
            skipped=training.stream.skipped,
            **flags,
        )
        self._sums, self._num_steps = {}, 0
        self._restart()
        return report

    def losses(self) -> dict[str, float]:
        """Average the losses since the last report over steps and ranks.

        Raises:
            TrainError: one of them is no number.
        """
        if not self._sums:
            return {}
        values = torch.stack([value.float() for value in self._sums.values()]) / self._num_steps
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        losses = dict(zip(self._sums, values.tolist(), strict=True))
        check_finite(losses, step=self._training.step, run_dir=self._run_dir)
        return losses
