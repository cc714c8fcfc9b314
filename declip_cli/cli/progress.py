"""Progress and summary of a run, on stderr."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip_cli.cli.console import Progress, note, terminal
from declip_cli.config_files import flatten

if TYPE_CHECKING:
    from declip_cli.train.health import StepReport


def show(report: "StepReport", tell: Progress) -> None:
    """Show one report: as the words of a bar on a terminal, elsewhere in a line."""
    if report.is_last and not report.losses:
        return
    words = [f"{name} {value:.3f}" for name, value in report.losses.items()]
    words += [f"gradient {report.gradient_norm:.2g}", f"{report.samples_per_second:,.0f} samples/s"]
    words += [f"waiting {report.wait_share:.0%}"]
    if terminal().is_terminal:
        tell(report.step, report.total_steps, " · ".join(words))
    else:
        note(f"step {report.step}/{report.total_steps} · {' · '.join(words)} · {report.seconds_left:,.0f} s left")
    for sentence in report.advice:
        note(sentence)
    for name, scores in report.evaluations.items() if not report.is_last else ():
        note(f"step {report.step} · {name} · {' · '.join(_score_words(scores))}")


def conclude(report: "StepReport", path: Path, data: tuple[str, ...]) -> None:
    """Say how the run in a folder ended and what can be done next."""
    for cause, (count, first) in report.skipped.items():
        note(f"skipped {count} samples: {cause} (first: {first})")
    if report.was_stopped:
        note(f"stopped at step {report.step} of {report.total_steps}; everything is saved")
        note(f"  resume: declip pretrain --resume {path}")
        return
    from declip_cli.data.benchmarks.known import known_sets

    note(f"done: {report.samples_seen:,} samples in {report.seconds:,.0f} s; the model is in {path / 'model'}")
    for name, scores in report.evaluations.items():
        known = known_sets().get(name)
        note(f"{name} ({known.note}):" if known is not None and known.note else f"{name}:")
        for line in _summary(scores):
            note(f"  {line}")
    known = known_sets().get(data[0]) if len(data) == 1 else None
    commands = known.try_next if known is not None else ()
    for command in commands or ("declip zeroshot FOLDER_OF_CLASSES --model {run}",):
        note(f"  try: {command.format(run=path)}")


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


def _score_words(scores: dict[str, Any]) -> list[str]:
    shares = {key: value for key, value in flatten(scores).items() if isinstance(value, float) and 0 <= value <= 1}
    return [f"{key.replace('.', ' ')} {value:.2%}" for key, value in shares.items()]
