"""One run from its folder to its last report: open or resume, train, record."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from declip_cli.config import RunConfig
from declip_cli.distributed import rank
from declip_cli.errors import TrainError
from declip_cli.model.resnet import ModifiedResNet
from declip_cli.train.loop import Evaluate, train
from declip_cli.train.meter import StepReport
from declip_cli.train.run_dir import RunDir
from declip_cli.train.setup import Training, build_training
from declip_cli.train.state import restore_state

Say = Callable[[str], None]
"""Tells people something; called on rank 0 only."""


def pretrain(
    config: RunConfig, path: Path, *, is_resumed: bool, evaluate: Evaluate | None, say: Say
) -> Iterator[StepReport]:
    """Train in a run folder that exists, recording every report.

    Args:
        config: the run.
        path: its folder, already created.
        is_resumed: go on from the newest state.
        evaluate: scores the model; None leaves evaluations out.
        say: for notes.

    Yields:
        Reports; the last has `is_last`.

    Raises:
        DeclipError: data, model, options or disk cannot be used.
    """
    run_dir = RunDir(path)
    has_state = is_resumed and run_dir.has_state()
    training = build_training(config, run_path=path, is_resumed=has_state)
    say_here: Say = say if rank() == 0 else lambda message: None
    if has_state:
        restore_state(training, run_dir.load_state())
    lines = list(_describe(training))
    if is_resumed and rank() == 0:
        run_dir.forget_metrics_after(training.step)
        lines += _take_over_changes(config, run_dir)
    for line in lines:
        say_here(line)
        if rank() == 0:
            run_dir.append_log(line)
    _start_tracker(training)
    try:
        with _stop_on_signals(say_here) as should_stop:
            for report in train(training, run_dir, evaluate=evaluate, should_stop=should_stop):
                _record(report, training, run_dir)
                yield report
    finally:
        training.stream.close()
        if config.train.tracker:
            training.accelerator.end_training()


def _describe(training: Training) -> Iterator[str]:
    config, accelerator, stream = training.config, training.accelerator, training.stream
    limit = f" or {config.train.time_limit_s:g} s" if config.train.time_limit_s else ""
    millions = sum(p.numel() for p in training.method.parameters()) / 1e6
    yield (
        f"{config.method.name} on {config.model.arch}: {millions:.1f} M parameters, {stream.num_samples} pairs, "
        f"batch {config.train.batch_size} × {accelerator.num_processes}, {training.total_steps} steps{limit}, "
        f"{accelerator.device.type}, {'fp32' if training.precision == 'no' else training.precision}"
    )
    if config.train.micro_batch_size and isinstance(training.method.encoder.visual, ModifiedResNet):
        yield (
            "note: with --micro-batch-size the ResNet's own BatchNorm sees one micro-batch at a time; "
            "the gradient is not exactly that of the whole batch (it is for ViT)"
        )
    if training.step >= training.total_steps:
        yield f"all {training.total_steps} steps are done already; more with --resume … --steps {2 * training.step}"
    elif training.step:
        yield f"going on from step {training.step} of {training.total_steps}"


def _take_over_changes(config: RunConfig, run_dir: RunDir) -> Iterator[str]:
    """Write down settings that differ from those of the run so far, once they have proved to fit."""
    before, now = _flat(asdict(run_dir.read_config())), _flat(asdict(config))
    changes = [f"{key} {before.get(key)} → {now.get(key)}" for key in before | now if before.get(key) != now.get(key)]
    if changes:
        run_dir.write_config(config)
        yield f"note: these settings differ from those the run was started with: {', '.join(changes)}"


def _start_tracker(training: Training) -> None:
    name = training.config.train.tracker
    if not name:
        return
    try:
        training.accelerator.init_trackers("declip", config=_flat(asdict(training.config)))
    except Exception as error:  # whatever the tracker's package raises
        raise TrainError(
            f"cannot start the tracker {name}: {error}",
            remedy="wandb login, or export WANDB_MODE=offline" if name == "wandb" else "leave out train.tracker",
        ) from error


def _record(report: StepReport, training: Training, run_dir: RunDir) -> None:
    if rank() != 0:
        return
    record = asdict(report)
    for name in ("is_last", "was_stopped", "seconds_left"):
        del record[name]
    run_dir.append_metrics(record)
    run_dir.append_log(f"step {report.step}/{report.total_steps} {_flat(report.losses)}")
    if training.config.train.tracker:
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        values |= {name: record[name] for name in ("learning_rate", "logit_scale", "samples_per_second", "wait_share")}
        numbers = {f"eval/{key}": v for key, v in _flat(report.evaluations).items() if isinstance(v, int | float)}
        training.accelerator.log(values | numbers, step=report.step)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


@contextmanager
def _stop_on_signals(say: Say) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a scheduler's SIGTERM end the run after the current step, with everything saved."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            say("stopping after this step and saving … (Ctrl-C twice more stops at once, without saving)")
        elif asked.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
