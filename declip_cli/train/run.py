"""One run from what was asked to its last report: resolve, open or resume, train, record."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from declip_cli.config import RunConfig
from declip_cli.config_files import to_plain
from declip_cli.data.shards.dataset import BLOCK_BYTES
from declip_cli.distributed import rank
from declip_cli.errors import TrainError
from declip_cli.model.resnet import ModifiedResNet
from declip_cli.process_group import from_first
from declip_cli.resolve import ResolvedRun, kept_settings, resolve
from declip_cli.train.build import Training, build_training, find_machine
from declip_cli.train.checkpoint import restore_state
from declip_cli.train.keeper import Evaluate, FindScore, load_same_state
from declip_cli.train.loop import train
from declip_cli.train.meter import StepReport
from declip_cli.train.pairs import facts_of, open_pairs
from declip_cli.train.run_dir import RunDir, SavedState

Say = Callable[[str], None]
"""Tells people something; called on rank 0 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a run is to do and where."""

    asked: RunConfig
    """From `resolve_run`."""
    path: Path
    """The run folder; of a new run, it is made."""
    is_resumed: bool = False
    force: bool = False
    """Replace a run that is there already."""


def plan(request: Request, *, num_processes: int, say: Say) -> tuple[ResolvedRun, int]:
    """Resolve a run that is not to be started.

    Args:
        request: what was asked.
        num_processes: how many there would be.
        say: for notes.

    Returns:
        The run and its steps, those taken already included.

    Raises:
        DeclipError: the run could not be started.
    """
    run_dir = RunDir(request.path, say)
    before = run_dir.read_run() if request.is_resumed else None
    state = run_dir.load_state() if request.is_resumed and run_dir.has_state() else None
    config = kept_settings(request.asked, before) if before else request.asked
    samples = open_pairs(config.data, before.data if before else None, say)
    machine = find_machine(config, num_processes=num_processes)
    step, samples_seen = (state.step, state.values["samples_seen"]) if state else (0, 0)
    run = resolve(
        request.asked, data=facts_of(samples), machine=machine, before=before, step=step, samples_seen=samples_seen
    )
    return run, run.total_steps(step=step, samples_seen=samples_seen)


def pretrain(
    request: Request, *, evaluate: Evaluate | None, find_score: FindScore | None = None, say: Say
) -> Iterator[StepReport]:
    """Train in a run folder, recording every report; on several ranks, call it on each.

    Args:
        request: what to do and where.
        evaluate: scores the model; None leaves evaluations out.
        find_score: finds the score of `train.keep_best` in what `evaluate` returned.
        say: for notes.

    Yields:
        Reports; the last has `is_last`.

    Raises:
        DeclipError: data, model, options or disk cannot be used.
    """
    say_here: Say = say if rank() == 0 else lambda message: None
    run_dir = RunDir(request.path, say_here)
    with ExitStack() as held:  # the lock, until the run is over
        yield from _pretrain(request, run_dir, held, evaluate=evaluate, find_score=find_score, say=say_here)


def _pretrain(
    request: Request,
    run_dir: RunDir,
    held: ExitStack,
    *,
    evaluate: Evaluate | None,
    find_score: FindScore | None,
    say: Say,
) -> Iterator[StepReport]:
    before, state = _before(request, run_dir, held)
    config = kept_settings(request.asked, before) if before else request.asked
    samples = open_pairs(config.data, before.data if before else None, say)
    run = resolve(
        request.asked,
        data=facts_of(samples),
        machine=find_machine(config),
        before=before,
        step=state.step if state else 0,
        samples_seen=state.values["samples_seen"] if state else 0,
    )
    with _memory_explained(run):
        training = build_training(run, samples, path=request.path, is_resumed=state is not None)
    lines = restore_state(training, state) if state else []
    if rank() == 0:
        if before is None:
            held.enter_context(run_dir.locked())
        lines = _open_folder(request, run_dir, run, before, training.step) + [f"note: {line}" for line in lines]
        for line in [f"run folder: {request.path}", *_describe(training), *lines]:
            say(line)
            run_dir.append_log(line)
    _start_tracker(training)
    try:
        with _stop_on_signals(say) as should_stop, _memory_explained(run):
            for report in train(training, run_dir, evaluate=evaluate, find_score=find_score, should_stop=should_stop):
                _record(report, training, run_dir)
                if report.is_last and rank() == 0 and training.stream.num_cut_captions:
                    length = run.config.model.context_length
                    say(f"{training.stream.num_cut_captions} texts were longer than {length} tokens and were cut")
                yield report
    finally:
        training.stream.close()
        if config.train.tracker:
            training.accelerator.end_training()


def _before(request: Request, run_dir: RunDir, held: ExitStack) -> tuple[ResolvedRun | None, SavedState | None]:
    """Read what the run was and how far it came; what rank 0 finds counts for all."""
    if not request.is_resumed:
        return None, None
    if rank() == 0:
        held.enter_context(run_dir.locked())
    before = from_first(run_dir.read_run)
    has_state = from_first(run_dir.has_state)
    if has_state and not run_dir.has_state():
        raise TrainError(
            f"process {rank()} sees no state in {request.path}, process 0 does",
            remedy="put the run folder on a file system that all machines share",
        )
    if not has_state:
        run_dir.say(f"note: {request.path} has no saved state: the run starts at step 0")
    return before, load_same_state(run_dir) if has_state else None


def _open_folder(
    request: Request, run_dir: RunDir, run: ResolvedRun, before: ResolvedRun | None, step: int
) -> list[str]:
    """Make the folder of a new run, or write down what differs in one that goes on, once it has proved to fit."""
    if before is None:
        run_dir.claim(force=request.force)
        run_dir.write_run(run)
        return []
    run_dir.forget_metrics_after(step)
    run_dir.write_run(run)
    old, new = _flat(to_plain(before.config)), _flat(to_plain(run.config))
    old |= {"processes": before.machine.world_size}
    new |= {"processes": run.machine.world_size}
    changes = [f"{key} {old.get(key)} → {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    if not changes:
        return []
    return [f"note: these settings differ from those the run was started with: {', '.join(changes)}"]


def _describe(training: Training) -> Iterator[str]:
    config, stream, machine = training.config, training.stream, training.run.machine
    limit = f" or {config.train.time_limit_s:g} s" if config.train.time_limit_s else ""
    millions = sum(p.numel() for p in training.method.parameters()) / 1e6
    total = training.total_steps
    yield (
        f"{config.method.name} on {config.model.arch}: {millions:.1f} M parameters, {stream.num_samples} pairs, "
        f"batch {config.train.batch_size} × {machine.world_size}, {total} steps{limit}, peak learning rate "
        f"{training.schedule.peak:.2g}, {machine.device}, {machine.precision}"
    )
    if config.data.order == "blocks" and training.run.data.is_counted:
        # A window that is read and the next one, each of up to twice as many blocks as asked for.
        num_open = config.data.open_blocks
        need_gb = min(4 * num_open, training.run.data.num_blocks) * BLOCK_BYTES / 1e9
        yield (
            f"pairs are read in blocks, {config.data.streams} streams, shuffled among at least {num_open} blocks; "
            f"of remote shards up to {need_gb:.1f} GB are kept at a time"
        )
        if need_gb > config.data.cache_gb:
            yield f"note: the cache is smaller (data.cache_gb = {config.data.cache_gb:g}): blocks will be read again"
    if config.train.micro_batch_size and isinstance(training.method.encoder.visual, ModifiedResNet):
        yield (
            "note: with --micro-batch-size the ResNet's own BatchNorm sees one micro-batch at a time; "
            "the gradient is not exactly that of the whole batch (it is for ViT)"
        )
    if training.samples_seen >= training.schedule.total:
        yield f"all {total} steps are done already; more with --resume … --steps {2 * training.step}"
    elif training.step:
        yield f"going on from step {training.step} of {total}"


def _start_tracker(training: Training) -> None:
    name = training.config.train.tracker
    if not name:
        return
    try:
        training.accelerator.init_trackers("declip", config=_flat(to_plain(training.config)))
    except Exception as error:  # whatever the tracker's package raises
        raise TrainError(
            f"cannot start the tracker {name}: {error}",
            remedy="wandb login, or export WANDB_MODE=offline" if name == "wandb" else "leave out train.tracker",
        ) from error


def _record(report: StepReport, training: Training, run_dir: RunDir) -> None:
    if rank() != 0:
        return
    record = asdict(report)
    for name in ("is_last", "was_stopped", "seconds_left", "step_seconds", "advice"):
        del record[name]
    run_dir.append_metrics(_finite(record))
    run_dir.append_log(f"step {report.step}/{report.total_steps} {_flat(report.losses)}")
    for sentence in report.advice:
        run_dir.append_log(sentence)
    if training.config.train.tracker:
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        names = ("learning_rate", "logit_scale", "gradient_norm", "samples_per_second", "wait_share", "num_bad_steps")
        values |= {name: record[name] for name in names}
        numbers = {f"eval/{key}": v for key, v in _flat(report.evaluations).items() if isinstance(v, int | float)}
        training.accelerator.log(values | numbers, step=report.step)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Put None in the place of what JSON has no number for."""

    def finite(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in values.items()}


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


@contextmanager
def _memory_explained(run: ResolvedRun) -> Iterator[None]:
    """Turn memory that ran out into an error with a way out.

    Raises:
        TrainError: there is not enough memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_other = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if is_other and "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        train = run.config.train
        size = train.micro_batch_size or train.batch_size
        raise TrainError(
            f"the memory of this {run.machine.device} is not enough for {size} pairs at once",
            remedy=f"--micro-batch-size {max(1, size // 2)}, which changes no result; --dry-run estimates the need",
        ) from error


@contextmanager
def _stop_on_signals(say: Say) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a scheduler's SIGTERM or SIGUSR1 end the run after the current step, with everything saved."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            say("stopping after this step and saving … (Ctrl-C twice more stops at once, without saving)")
        elif asked.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
