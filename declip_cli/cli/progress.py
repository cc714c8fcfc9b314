"""How a run looks while it goes and when it ends, on stderr."""

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from declip_cli.cli.console import note, stderr

if TYPE_CHECKING:
    from declip_cli.train.meter import StepReport
    from declip_cli.train.run import Request


class RunProgress:
    """A bar on a terminal, plain lines elsewhere; nothing on ranks other than 0.

    Args:
        request: what the run was asked.
    """

    def __init__(self, request: "Request") -> None:
        self._data = request.asked.data.path
        self.last_losses: dict[str, float] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        is_hidden = not stderr.is_terminal or os.environ.get("RANK", "0") != "0"
        self._bar = Progress(*columns, TimeRemainingColumn(), console=stderr, disable=is_hidden)
        self._task = self._bar.add_task("training", total=None)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, report: "StepReport") -> None:
        """Show one report."""
        from declip_cli.distributed import rank

        if rank() != 0:
            return
        self.last_losses = report.losses or self.last_losses
        if report.is_last and not report.losses:
            return
        words = [f"{name} {value:.3f}" for name, value in report.losses.items()]
        words += [f"gradient {report.gradient_norm:.2g}", f"{report.samples_per_second:,.0f} samples/s"]
        words += [f"waiting {report.wait_share:.0%}"]
        if stderr.is_terminal:
            self._bar.update(self._task, description=" · ".join(words), completed=report.step, total=report.total_steps)
        else:
            left = f"{report.seconds_left:,.0f} s left"
            note(f"step {report.step}/{report.total_steps} · {' · '.join(words)} · {left}")
        for sentence in report.advice:
            note(sentence)
        if not report.is_last:
            for name, scores in report.evaluations.items():
                note(f"step {report.step} · {name} · {' · '.join(_score_words(scores))}")

    def close(self, report: "StepReport", path: Path) -> None:
        """Say how the run ended and what can be done next."""
        from declip_cli.distributed import rank

        if rank() != 0:
            return
        for cause, (count, first) in report.skipped.items():
            note(f"skipped {count} samples: {cause} (first: {first})")
        if report.was_stopped:
            note(f"stopped at step {report.step} of {report.total_steps}; everything is saved")
            note(f"  go on: declip pretrain --resume {path}")
            return
        note(f"done: {report.samples_seen:,} samples in {report.seconds:,.0f} s; the model is in {path / 'model'}")
        for name, scores in report.evaluations.items():
            note(f"{name}{_about(name)}:")
            for line in _summary(scores):
                note(f"  {line}")
        for command in _next_commands(path, self._data):
            note(f"  try: {command}")


def _summary(scores: dict[str, Any]) -> list[str]:
    """Put scores beside chance, a line each."""
    lines = []
    for key, label in (("top1", "top-1"), ("top5", "top-5")):
        if key in scores:
            chance = scores[f"chance_{key}"]
            lines.append(
                f"zero-shot {label} among {scores['num_classes']:,} names: {scores[key]:.1%}  "
                f"(chance {chance:.2%}: {scores[key] / chance:,.0f} times that)"
            )
    for key, label in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        if key in scores:
            recalls = (f"@{k} {scores[key][f'recall_at_{k}']:.1%}" for k in (1, 5, 10))
            lines.append(f"{label} recall {' · '.join(recalls)}  (chance @10 {10 / scores['num_images']:.2%})")
    return lines or _score_words(scores)


def _score_words(scores: dict[str, Any], prefix: str = "") -> list[str]:
    words = []
    for key, value in scores.items():
        if isinstance(value, dict):
            words += _score_words(value, f"{prefix}{key} ")
        elif isinstance(value, float) and 0 <= value <= 1:
            words.append(f"{prefix}{key} {value:.2%}")
    return words


def _about(name: str) -> str:
    from declip_cli.data.benchmarks.known import known_sets

    known = known_sets().get(name)
    return f" ({known.note})" if known is not None and known.note else ""


def _next_commands(path: Path, data: tuple[str, ...]) -> list[str]:
    from declip_cli.data.benchmarks.known import known_sets

    known = known_sets().get(data[0]) if len(data) == 1 else None
    commands = known.try_next if known is not None else ()
    return [command.format(run=path) for command in commands or ("declip zeroshot FOLDER_OF_CLASSES --model {run}",)]
