"""One run from what was asked to its last report: resolve, open or resume, train, record."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from declip_cli.config import MethodConfig, RunConfig
from declip_cli.config_files import flatten, load_recipe, recipe_of_data, to_plain
from declip_cli.data.dataset import Dataset
from declip_cli.data.shards.dataset import BLOCK_BYTES
from declip_cli.distributed import rank
from declip_cli.errors import TrainError
from declip_cli.model.resnet import ModifiedResNet
from declip_cli.pages.run_files import SAMPLES_FILE, Reports
from declip_cli.pages.run_page import write_run_page
from declip_cli.process_group import from_first, signals_handled
from declip_cli.resolve import ResolvedRun, kept_settings, resolve
from declip_cli.train.batches import DeviceBatches
from declip_cli.train.build import Training, build_training, find_machine
from declip_cli.train.checkpoint import Evaluate, load_same_state, restore_state
from declip_cli.train.compiled import compiling_explained
from declip_cli.train.first_pairs import observe_first, write_first_pairs
from declip_cli.train.health import StepReport
from declip_cli.train.loop import train
from declip_cli.train.pairs import facts_of, open_pairs
from declip_cli.train.run_dir import RunDir, SavedState
from declip_cli.train.start import take_over
from declip_cli.train.tracker import Tracker

Log = Callable[[str], None]
"""Writes a note for people; called on rank 0 only."""
SMALL_DATA = range(5_000, 500_001)
"""Numbers of pairs for which the recipe `small` is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a run should do and where."""

    asked: RunConfig
    """From `resolve_run`."""
    path: Path
    """The run folder; of a new run, it is made."""
    is_resumed: bool = False
    force: bool = False
    """Replace an existing run."""


def plan(request: Request, *, num_processes: int, log: Log) -> tuple[ResolvedRun, int]:
    """Resolve a run that is not to be started; return it and its steps, those taken already included.

    Raises:
        DeclipError: the run could not be started.
    """
    run_dir = RunDir(request.path, log)
    before = run_dir.read_run() if request.is_resumed else None
    state = run_dir.load_state() if request.is_resumed and run_dir.has_state() else None
    run, _ = _resolve(request, before, state, log, num_processes=num_processes)
    return run, run.total_steps(step=state.step, samples_seen=state.samples_seen) if state else run.total_steps()


def pretrain(request: Request, *, evaluate: Evaluate | None, log: Log) -> Iterator[StepReport]:
    """Train in a run folder, recording every report; on several ranks, call it on each.

    Args:
        request: what to do and where.
        evaluate: scores the model; None leaves evaluations out.
        log: for notes.

    Yields:
        Reports; the last has `is_last`.

    Raises:
        DeclipError: data, model, options or disk cannot be used.
    """
    is_main = rank() == 0
    log = log if is_main else lambda message: None
    run_dir = RunDir(request.path, log)
    with ExitStack() as held:  # the lock, until the run is over
        training, tracker, lines = _begin(request, run_dir, held)
        held.callback(training.stream.close)
        for line in lines if is_main else ():
            log(line)
            run_dir.append_log(line)
        with _stop_on_signals(log) as should_stop, _memory_explained(training.run), compiling_explained():
            shown_step, shown = run_dir.saved_step, Reports()
            for report in train(training, run_dir, evaluate=evaluate, should_stop=should_stop):
                if is_main:
                    _record(report, run_dir, tracker)
                if is_main and (report.is_last or run_dir.saved_step != shown_step):
                    shown_step = run_dir.saved_step
                    _ignoring_errors(partial(write_run_page, run_dir.path, shown), log)
                if report.is_last and training.stream.num_truncated_captions:
                    length = training.config.model.context_length
                    log(f"{training.stream.num_truncated_captions} texts were longer than {length} tokens and were cut")
                yield report


def _resolve(
    request: Request,
    before: ResolvedRun | None,
    state: SavedState | None,
    log: Log,
    *,
    num_processes: int | None = None,
) -> tuple[ResolvedRun, Dataset]:
    asked = request.asked if before else take_over(request.asked, log)
    config = kept_settings(asked, before) if before else asked
    samples = open_pairs(config.data, before.data if before else None, log)
    run = resolve(
        asked,
        data=facts_of(samples),
        machine=find_machine(config, num_processes=num_processes),
        before=before,
        step=state.step if state else 0,
        samples_seen=state.samples_seen if state else 0,
    )
    if before is None and (proposal := propose_recipe(asked, run.data.num_pairs)):
        log(proposal)
    return run, samples


def propose_recipe(asked: RunConfig, num_pairs: int) -> str | None:
    """Name the recipe for few pairs, to those who asked for no method and no setting of it."""
    if num_pairs not in SMALL_DATA or asked.method != MethodConfig() or asked.train.init:
        return None
    return (
        f"note: for {SMALL_DATA[0]:,} to {SMALL_DATA[-1]:,} pairs there is --recipe small (here are {num_pairs:,}); "
        "it was measured with --arch vit-tiny32"
    )


def _begin(request: Request, run_dir: RunDir, held: ExitStack) -> tuple[Training, Tracker | None, list[str]]:
    """Put the run together, or together again, and open its folder; return it and what there is to say of it."""
    before, state = _before(request, run_dir, held)
    run, samples = _resolve(request, before, state, run_dir.log)
    with _memory_explained(run):
        training = build_training(run, samples, path=request.path, is_resumed=state is not None)
    notes = restore_state(training, state) if state else []
    tracker = None
    if rank() == 0:
        if before is None:
            run_dir.check_free(force=request.force)
        if run.config.train.tracker:
            tracker = Tracker(training, request.path, flatten(to_plain(run.config)))
            held.callback(tracker.close)
        if before is None:
            held.enter_context(run_dir.locked())
            run_dir.claim(force=request.force)
        else:
            run_dir.forget_metrics_after(training.step)
            notes = _changes(before, run) + notes
        run_dir.write_run(run)
        _watch_first_pairs(training, request.path / SAMPLES_FILE, run_dir.log)
    notes = [f"run folder: {request.path}", *_describe(training), *(f"note: {note}" for note in notes)]
    return training, tracker, notes


def _watch_first_pairs(training: Training, path: Path, log: Log) -> None:
    """Have the first pairs of the run written for its page, as they come to the model."""
    if not path.exists():
        write = partial(write_first_pairs, path, views=training.method.views)
        batches = observe_first(training.stream, lambda batch: _ignoring_errors(partial(write, batch), log))
        training.batches = DeviceBatches(batches, training.accelerator.device)


def _ignoring_errors(write: Callable[[], object], log: Log) -> None:
    """Write what only people look at; whatever goes wrong is reported and does not end the run."""
    try:
        write()
    except Exception as error:
        log(f"note: a part of the run's page could not be written: {error!r}")


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
        run_dir.log(f"note: {request.path} has no saved state: the run starts at step 0")
    return before, load_same_state(run_dir) if has_state else None


def _changes(before: ResolvedRun, run: ResolvedRun) -> list[str]:
    """Return what differs in a resumed run."""
    old, new = (flatten(to_plain(one.config)) | {"processes": one.machine.world_size} for one in (before, run))
    changes = [f"{key} {old.get(key)} → {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    return [f"these settings differ from those the run was started with: {', '.join(changes)}"] if changes else []


def _recipe_without(terms: list[str], config: RunConfig) -> str | None:
    """Name the recipe that comes with the data if it switches these terms off."""
    recipe = recipe_of_data(list(config.data.path))
    weights = load_recipe(recipe).get("method", {}).get("weights", {}) if recipe is not None else {}
    return recipe if all(weights.get(term) == 0 for term in terms) else None


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
    off = [name for name in training.method.default_weights if not training.method.is_active(name)]
    if off:
        why = "" if (recipe := _recipe_without(off, config)) is None else f"; recipe {recipe} says why"
        yield f"loss terms of {config.method.name} that are switched off (method.weights): {', '.join(off)}{why}"
    if machine.device == "cuda" or config.train.compile is True:
        yield training.compilation.reason
    if config.data.order == "blocks" and training.run.data.is_counted:
        # A window that is read and the next one, each of up to twice as many blocks as asked for.
        num_open = config.data.open_blocks
        need_gb = min(4 * num_open, training.run.data.num_blocks) * BLOCK_BYTES / 1e9
        yield (
            f"pairs are read in blocks, {config.data.streams} streams, shuffled among at least {num_open} blocks; "
            f"up to {need_gb:.1f} GB are kept at a time"
        )
        if need_gb > config.data.cache_gb:
            yield f"note: the cache is smaller (data.cache_gb = {config.data.cache_gb:g}): blocks will be read again"
    if config.train.micro_batch_size and isinstance(training.method.encoder.visual, ModifiedResNet):
        yield (
            "note: with --micro-batch-size the ResNet's own BatchNorm sees one micro-batch at a time; "
            "the gradient is not exactly that of the whole batch (it is for ViT)"
        )
    if training.samples_seen >= training.schedule.total:
        yield f"all {total} steps are already done; for more: --resume … --steps {2 * training.step}"
    elif training.step:
        yield f"resuming from step {training.step} of {total}"


def _record(report: StepReport, run_dir: RunDir, tracker: Tracker | None) -> None:
    record = asdict(report)
    for name in ("is_last", "was_stopped", "seconds_left", "step_seconds", "advice"):
        del record[name]
    run_dir.append_metrics(_finite(record))
    run_dir.append_log(f"step {report.step}/{report.total_steps} {report.losses}")
    for sentence in report.advice:
        run_dir.append_log(sentence)
    if tracker is not None:
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        names = ("learning_rate", "logit_scale", "gradient_norm", "samples_per_second", "wait_share", "num_bad_steps")
        values |= {name: record[name] for name in names}
        values |= {"logit_bias": report.logit_bias} if report.logit_bias is not None else {}
        numbers = {f"eval/{key}": v for key, v in flatten(report.evaluations).items() if isinstance(v, int | float)}
        tracker.log(values | numbers, step=report.step)


def _finite(value: Any) -> Any:  # noqa: ANN401
    """Replace what JSON has no number for by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _memory_explained(run: ResolvedRun) -> Iterator[None]:
    """Turn running out of memory into an error with a remedy."""
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
def _stop_on_signals(log: Log) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a scheduler's SIGTERM or SIGUSR1 end the run after the current step, with everything saved."""
    asked: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        if len(asked) == 1:
            log("stopping after this step and saving … (Ctrl-C twice more stops at once, without saving)")
        elif asked.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # whoever runs us there handles signals
        yield lambda: False
        return
    with signals_handled(handle):
        yield lambda: bool(asked)
