"""Count and time steps; sums stay on the device until somebody asks."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.batch import Embeddings, LossTerms
from declip_cli.distributed import world_size
from declip_cli.train.build import Training
from declip_cli.train.health import StepReport, advice, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one step leaves behind, on the device."""

    terms: LossTerms
    embeddings: Embeddings
    gradient_norm: Tensor
    """Before clipping, ()."""
    is_good: Tensor
    """Whether the step was taken: the gradient was finite, bool, ()."""
    is_bad: Tensor
    """Whether the batch was broken; in float16 a gradient may overflow without that, bool, ()."""


class Meter:
    """Collect losses and times between two reports."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._began = time.monotonic() - training.seconds
        self._sums: dict[str, Tensor]
        self._max_norm: Tensor | None
        self._last: Embeddings | None
        self._advised: set[str] = set()
        self._is_first_step = True
        self._num_bad_before = int(training.bad_steps[0])
        self._restart()

    def _restart(self) -> None:
        self._sums, self._max_norm, self._last = {}, None, None
        self._last_time = time.monotonic()
        self._paused = 0.0
        self._last_samples = self._training.samples_seen
        self._last_wait = self._training.stream.wait_seconds

    def seconds(self) -> float:
        """Return the time since the run began, interruptions left out."""
        return time.monotonic() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the speed what is no training, such as an evaluation."""
        self._wait_for_device()
        began = time.monotonic()
        yield
        self._wait_for_device()
        self._paused += time.monotonic() - began

    def add(self, outcome: StepOutcome) -> None:
        """Add one step, without waiting for the device."""
        good, training = outcome.is_good, self._training
        values = outcome.terms.terms | {"total": outcome.terms.total}
        for name, value in (values | {"(steps)": torch.ones_like(outcome.terms.total)}).items():
            kept = torch.where(good, value.float(), 0.0)
            self._sums[name] = self._sums.get(name, torch.zeros_like(kept)) + kept
        norm = torch.where(good, outcome.gradient_norm, 0.0)
        self._max_norm = norm if self._max_norm is None else torch.maximum(self._max_norm, norm)
        bad = outcome.is_bad.long()
        training.bad_steps[0] += bad
        training.bad_steps[1] = (training.bad_steps[1] + bad) * bad
        self._last = outcome.embeddings
        if self._is_first_step:
            self._is_first_step = False
            self._wait_for_device()
            training.startup_seconds += time.monotonic() - self._last_time

    def problem(self) -> str:
        """Return why the run cannot continue; empty while it can. Waits for the device; the same on all ranks."""
        flags = self._training.bad_steps.cpu()
        if world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            self._training.bad_steps.copy_(flags)
        in_a_row = int(flags[1])
        if in_a_row < self._training.config.train.max_bad_steps:
            return ""
        return f"{in_a_row} batches in a row had a broken gradient, up to step {self._training.step}"

    def report(self, *, learning_rate: float, share: float, evaluations: Mapping[str, dict[str, Any]]) -> StepReport:
        """Sum up what happened since the last report and start over.

        Args:
            learning_rate: the learning rate in use.
            share: how much of the run is done, in (0, 1].
            evaluations: scores taken at this step.

        Returns:
            The report, the same on every rank but for its times.
        """
        training = self._training
        self._wait_for_device()  # else the device's backlog would be in nobody's interval
        elapsed = max(1e-9, time.monotonic() - self._last_time - self._paused)
        training.seconds, scaler = self.seconds(), training.accelerator.scaler
        training.step_seconds += elapsed
        last = {} if self._last is None else {"image": self._last.images[:, 0], "text": self._last.texts[:, 0]}
        report = StepReport(
            step=training.step,
            total_steps=training.total_steps,
            samples_seen=training.samples_seen,
            seconds=training.seconds,
            seconds_left=training.seconds / share - training.seconds,
            step_seconds=training.step_seconds,
            samples_per_second=(training.samples_seen - self._last_samples) / elapsed,
            wait_share=min(1.0, (training.stream.wait_seconds - self._last_wait) / elapsed),
            learning_rate=learning_rate,
            logit_scale=float(training.method.logit_scale_in_use().detach().exp()),
            logit_bias=_number(training.method.encoder.logit_bias),
            gradient_norm=0.0 if self._max_norm is None else float(self._max_norm),
            loss_scale=scaler.get_scale() if scaler is not None else None,
            peak_memory_mib=_peak_memory_mib(training.accelerator.device),
            num_bad_steps=int(training.bad_steps[0]),
            spread={name: float(spread(embeds)) for name, embeds in last.items()},
            losses=self._losses(),
            evaluations=dict(evaluations),
            skipped=training.stream.skipped,
        )
        report = replace(report, advice=self._advice(report))
        self._restart()
        return report

    def forget(self) -> None:
        """Start over after a rollback to an earlier state."""
        self._num_bad_before = int(self._training.bad_steps[0])
        self._began = time.monotonic() - self._training.seconds
        self._restart()

    def _losses(self) -> dict[str, float]:
        """Average the losses of the good steps since the last report over steps and ranks."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values()))
        if world_size() > 1:
            dist.all_reduce(values)
        sums = dict(zip(self._sums, values.tolist(), strict=True))
        num_steps = sums.pop("(steps)")
        return {name: value / num_steps for name, value in sums.items()} if num_steps else {}

    def _advice(self, report: StepReport) -> tuple[str, ...]:
        num_texts = report.samples_seen // world_size() * len(self._training.method.views.texts)
        found = advice(
            report,
            self._training.run,
            num_skipped=report.num_bad_steps - self._num_bad_before,
            truncated_share=self._training.stream.num_truncated_captions / max(1, num_texts),
        )
        self._num_bad_before = report.num_bad_steps
        new = {kind: sentence for kind, sentence in found if kind not in self._advised}
        self._advised |= new.keys()
        return tuple(new.values())

    def _wait_for_device(self) -> None:
        if self._training.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value.detach())


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would count what the process was before exec
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
