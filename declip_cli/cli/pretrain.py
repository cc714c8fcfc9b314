"""`declip pretrain`: from options to a run, from reports to a progress line."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from declip_cli.cli.console import emit, note, progress_of, user_errors
from declip_cli.cli.options import Assume, Force, Json
from declip_cli.config import MethodName, TrainConfig
from declip_cli.errors import ChoiceError, ConfigError

if TYPE_CHECKING:
    from declip_cli.train.run import Request

_TRAIN = TrainConfig()
_PRECISIONS = Literal["auto", "fp32", "bf16", "fp16"]


def pretrain(
    data: Annotated[
        list[str] | None, typer.Option(help="Shard folder, tar pattern or `demo`; several are joined.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="vit-b32, vit-l14, rn50, vit-tiny32 …, open_clip:NAME, or init: as --init.", show_default="vit-b32"
        ),
    ] = None,
    method: Annotated[MethodName | None, typer.Option(help="Training method.", show_default="declip")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A published configuration; see --list-recipes.", show_default="none")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="List the recipes and stop.")] = False,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the data.", show_default="32")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; overrides --epochs.", show_default="by --epochs")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs per step and process.", show_default=str(_TRAIN.batch_size))
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pairs per forward pass; the gradient stays the same.", show_default="the whole batch"
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="1e-3 · sqrt(global batch / 4096)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD-ARCH-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume this run.")] = None,
    init: Annotated[str | None, typer.Option(help="Model to start from.", show_default="random weights")] = None,
    assume: Assume = None,
    evaluate: Annotated[
        list[str] | None, typer.Option("--eval", help="Evaluation sets to score in training and at the end.")
    ] = None,
    precision: Annotated[
        _PRECISIONS | None, typer.Option(help="Number format of forward passes.", show_default=_TRAIN.precision)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes to start.", show_default="one per GPU, else one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process.", show_default="all cores")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of weights, shuffling and augmentation.", show_default=str(_TRAIN.seed)),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with sections model, data, …; or a run's config.json, to repeat it.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for everything else; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, with steps and memory, and train nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a dual encoder on image-text pairs.

    Example: `declip pretrain --data shards/ --arch vit-b32 --batch-size 512 --eval demo`
    """
    with user_errors():
        if list_recipes:
            _print_recipes(as_json)
            return
        options: dict[str, dict[str, Any]] = {
            "model": {"arch": arch},
            "method": {"name": method},
            "data": {"path": data or None},
            "optim": {"learning_rate_peak": learning_rate},
            "train": {
                "epochs": epochs,
                "steps": steps,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "init": init,
                "assume": assume or None,
                "eval": evaluate or None,
                "precision": precision,
                "processes": processes,
                "threads": threads,
                "seed": seed,
            },
        }
        request = partial(_request, options, recipe, config, assignments or [], out=out, resume=resume, force=force)
        report = _plan(request()) if dry_run else _start(request)
        if report:
            emit(report, as_json=as_json)
        if report.get("stopped"):
            raise typer.Exit(130)


def _print_recipes(as_json: bool) -> None:
    from declip_cli.config_files import list_recipes

    recipes = list_recipes()
    if as_json:
        emit({"recipes": [{"name": name, "title": title} for name, title in recipes.items()]}, as_json=True)
    else:
        emit(recipes, as_json=False)


def _request(
    options: Mapping[str, Mapping[str, Any]],
    recipe: str | None,
    file: Path | None,
    assignments: list[str],
    *,
    out: Path | None,
    resume: Path | None,
    force: bool,
) -> "Request":
    """Turn the options of the command line into a request."""
    from declip_cli.model.architectures import OF_INIT, find_architecture
    from declip_cli.model.checkpoint import runs_root
    from declip_cli.process_group import is_launched
    from declip_cli.resolve import resolve_run
    from declip_cli.train.run import Request
    from declip_cli.train.run_dir import RunDir, default_run_dir

    new_only = [option for option, given in (("--out", out), ("--force", force), ("--recipe", recipe)) if given]
    if resume is not None and new_only:
        raise ConfigError(
            f"--resume continues the run in its folder with its settings, {new_only[0]} starts a new one",
            remedy=f"omit {new_only[0]}, or omit --resume",
        )
    before = RunDir(resume).read_run().asked if resume is not None else None
    asked, notes = resolve_run(recipe, file, options, assignments, before=before)
    if not asked.train.init or asked.model.arch != OF_INIT:
        find_architecture(asked.model)  # a wrong name is reported before anything else happens
    if asked.train.processes and is_launched():
        notes.append("note: --processes changes nothing here, a launcher has started the processes")
    if os.environ.get("RANK", "0") == "0":
        for line in notes:
            note(line)
    path = resume or out or default_run_dir(runs_root(), method=asked.method.name, arch=asked.model.arch)
    return Request(asked=asked, path=path, is_resumed=resume is not None, force=force)


def _plan(request: "Request") -> dict[str, Any]:
    """Print what a run would do."""
    from declip_cli.train import launch
    from declip_cli.train.compiled import is_compiled
    from declip_cli.train.estimate import estimate_memory, find_free_memory
    from declip_cli.train.run import plan

    run, total_steps = plan(request, num_processes=launch.wanted_processes(request.asked.train), log=note)
    settled = run.to_json()
    facts = settled["run"] | {"samples": run.config.train.samples, "total_steps": total_steps}
    estimate, free = estimate_memory(run), find_free_memory(run)
    facts |= {"compiled": is_compiled(run)[1]}
    facts |= {"free_memory_mib": round(free / 2**20, 1), "largest_micro_batch": estimate.largest_micro_batch(free)}
    return {"run": facts, "memory_mib": estimate.to_mebibytes(), "config": settled["config"]}


def _start(make_request: "Callable[[], Request]") -> dict[str, Any]:
    """Run here or in several processes; return what the first of them has to print."""
    from declip_cli.process_group import is_launched
    from declip_cli.train import launch

    if is_launched():
        return _work(make_request)
    request = make_request()
    num_processes = launch.wanted_processes(request.asked.train)
    try:
        if num_processes == 1:
            return _work(lambda: request)
        return launch.start_processes(_rank, (request,), num_processes=num_processes)
    except launch.RankFailed as failure:
        raise typer.Exit(failure.exit_code) from failure
    except KeyboardInterrupt:
        note(f"stopped at once; resume from the last saved state: declip pretrain --resume {request.path}")
        raise


def _rank(request: "Request") -> dict[str, Any]:
    """Run as one of several processes, which reports its own errors."""
    try:
        with user_errors():
            return _work(lambda: request)
    except typer.Exit as end:
        sys.exit(end.exit_code)


def _check_best(path: str | None, known: tuple[str, ...]) -> None:
    """Raise unless the run will compute the score that `train.keep_best` names."""
    if path is not None and path not in known:
        raise ChoiceError(
            f"train.keep_best is not a score of this run: {path}",
            remedy=f"choose from {', '.join(known)}" if known else "name an evaluation with --eval",
        )


def _work(make_request: "Callable[[], Request]") -> dict[str, Any]:
    """Train in this process and return the result to print; empty on ranks other than 0.

    Ranks join before anything can fail on one of them alone.
    """
    import torch

    from declip_cli.cli.progress import conclude, show
    from declip_cli.distributed import rank
    from declip_cli.evaluate.during_training import make_evaluator
    from declip_cli.process_group import from_first, joined
    from declip_cli.train.build import count_cores
    from declip_cli.train.run import pretrain as run

    with joined(has_gpu=torch.cuda.is_available(), log=note):
        request = make_request()
        request = replace(request, path=from_first(lambda: request.path))  # each would name one by its own clock
        train = request.asked.train
        evaluator = make_evaluator(train.eval, threads=train.threads or count_cores()) if train.eval else None
        if rank() == 0:
            _check_best(train.keep_best, evaluator.score_paths if evaluator is not None else ())
        report, losses = None, dict[str, float]()
        with progress_of("training") if rank() == 0 else nullcontext() as tell:
            for report in run(request, evaluate=evaluator, log=note):
                losses = report.losses or losses
                if tell is not None:
                    show(report, tell)
        assert report is not None  # a run always ends with a report
        if rank() != 0:
            return {}
        conclude(report, request.path, request.asked.data.path)
        return {
            "run_dir": str(request.path),
            "method": request.asked.method.name,
            "arch": request.asked.model.arch,
            "steps": report.step,
            "samples_seen": report.samples_seen,
            "seconds": report.seconds,
            "samples_per_second": report.samples_seen / max(report.step_seconds, 1e-9),
            "losses": losses,
            "evaluations": report.evaluations,
            "stopped": report.was_stopped,
        }
