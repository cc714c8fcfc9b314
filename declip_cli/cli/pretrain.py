"""`declip pretrain`: from options to a run, from reports to a progress line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from declip_cli.cli.console import emit, note, user_errors
from declip_cli.cli.options import Force, Json

if TYPE_CHECKING:
    from declip_cli.config import RunConfig
    from declip_cli.train.meter import StepReport


def pretrain(
    data: Annotated[
        Optional[list[str]],  # noqa: UP045  (Typer reads this form on every Python it supports)
        typer.Option("--data", help="Shard folder, tar pattern or `demo`; several are joined."),
    ] = None,
    arch: Annotated[str, typer.Option("--arch", help="vit-b32, vit-b16, vit-s16, rn50, rn101, vit-tiny32 …")] = "",
    method: Annotated[str, typer.Option("--method", help="declip, clip, slip, filip or defilip.")] = "",
    recipe: Annotated[str, typer.Option("--recipe", help="A published configuration; see --list-recipes.")] = "",
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="List the recipes and stop.")] = False,
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Passes over the data (default 32).")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Optimizer steps; overrides --epochs.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=0, help="Pairs per step and process.")] = 0,
    micro_batch_size: Annotated[
        int, typer.Option("--micro-batch-size", min=0, help="Pairs per forward pass; the gradient stays the same.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0, help="Peak learning rate.")] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Run folder. Default: runs/METHOD-ARCH-TIME."),
    ] = None,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--resume", help="Go on with this run folder."),
    ] = None,
    init: Annotated[str, typer.Option("--init", help="Model to start from.")] = "",
    evaluate: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--eval", help="Evaluation sets to score in training and at the end."),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")] = "",
    processes: Annotated[int, typer.Option("--processes", min=0, help="Default: one per GPU, else one.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 takes the cores there are.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, shuffle and augmentation; -1: as configured.")] = -1,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", help="TOML file with sections model, data, augment, method, optim, train."),
    ] = None,
    assignments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="section.key=value, for everything else; may be repeated."),
    ] = None,
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
            "data": {"path": data or []},
            "optim": {"learning_rate_peak": learning_rate},
            "train": {
                "epochs": epochs,
                "steps": steps,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "init": init,
                "eval": evaluate or [],
                "precision": precision,
                "processes": processes,
                "threads": threads,
            },
        }
        given = {section: {k: v for k, v in values.items() if v} for section, values in options.items()}
        if seed >= 0:
            given["train"]["seed"] = seed
        sources = _Sources(recipe=recipe, config=config, given=given, assignments=assignments or [])
        _start(sources, out=out, resume=resume, force=force, as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """Where settings come from, weakest first: recipe, file, options, assignments."""

    recipe: str
    config: Path | None
    given: dict[str, dict[str, Any]]
    assignments: list[str]


def _print_recipes(as_json: bool) -> None:
    from declip_cli.recipes import list_recipes

    recipes = list_recipes()
    if as_json:
        emit({"recipes": [{"name": r.name, "title": r.title} for r in recipes]}, as_json=True)
    else:
        emit({recipe.name: recipe.title for recipe in recipes}, as_json=False)


def _start(sources: _Sources, *, out: Path | None, resume: Path | None, force: bool, as_json: bool) -> None:
    """Create or reopen the run folder, run here or in several processes, print the result."""
    from declip_cli.train import launch
    from declip_cli.train.run_dir import RunDir

    launch.join_slurm()
    is_first = launch.is_main_process()
    if resume is not None:
        _check_resume(sources, out=out, force=force)
        path, config = resume, _resumed_config(sources, resume)
    else:
        path, config = _new_run(sources, out)
    if is_first:
        _tell_ignored(sources, config, is_launched=launch.is_launched())
        if resume is None:
            RunDir(path).create(config, force=force)
        note(f"run folder: {path}")
    num_processes = 1 if launch.is_launched() else launch.wanted_processes(config.train.processes)
    arguments = (config, path, resume is not None)
    try:
        if num_processes == 1:
            report = _work(*arguments)
        else:
            report = launch.start_processes(_work, arguments, num_processes=num_processes)
    except KeyboardInterrupt:
        if is_first:
            note(f"stopped at once; go on from the last saved state: declip pretrain --resume {path}")
        raise
    if is_first:
        emit(report, as_json=as_json)
    if report["stopped"]:
        raise typer.Exit(130)


def _check_resume(sources: _Sources, *, out: Path | None, force: bool) -> None:
    from declip_cli.errors import ConfigError

    for option, is_given in {"--out": out, "--force": force, "--recipe": sources.recipe}.items():
        if is_given:
            raise ConfigError(
                f"--resume goes on in the folder and with the settings of the run, {option} starts a new one",
                remedy=f"leave out {option}, or leave out --resume",
            )


def _tell_ignored(sources: _Sources, config: "RunConfig", *, is_launched: bool) -> None:
    """Name options that were given but change nothing."""
    from declip_cli.config_files import merge_into, parse_assignments, read_toml
    from declip_cli.methods.registry import METHODS

    chosen: dict[str, Any] = read_toml(sources.config) if sources.config is not None else {}
    merge_into(chosen, parse_assignments(sources.assignments))
    for key in set(chosen.get("method", {})) - METHODS[config.method.name].options:
        note(f"note: method {config.method.name} does not use method.{key}")
    if chosen.get("train", {}).get("eval_every_steps") and not config.train.eval:
        note("note: train.eval_every_steps changes nothing without --eval")
    if config.train.processes and is_launched:
        note("note: --processes changes nothing here, a launcher has started the processes")


def _settings(sources: _Sources, *, is_new: bool = True) -> dict[str, Any]:
    from declip_cli.config_files import parse_assignments, read_toml
    from declip_cli.recipes import load_recipe

    is_demo = is_new and sources.given["data"].get("path") == ["demo"]
    name = sources.recipe or ("declip-demo" if is_demo and sources.config is None else "")
    settings: dict[str, Any] = load_recipe(name) if name else {}
    chosen = sources.given["method"].get("name", "")
    if chosen and chosen != settings.get("method", {}).get("name", chosen):
        _leave_out_other_method(settings["method"], chosen, recipe=name)
    if sources.config is not None:
        _overlay(settings, read_toml(sources.config))
    _overlay(settings, sources.given)
    _overlay(settings, parse_assignments(sources.assignments))
    return settings


def _leave_out_other_method(settings: dict[str, Any], chosen: str, *, recipe: str) -> None:
    """Keep of a recipe for another method what the chosen one has too; loss weights are each method's own."""
    from declip_cli.methods.registry import METHODS
    from declip_cli.train.launch import is_main_process

    options = METHODS[chosen].options if chosen in METHODS else set(settings)
    for key in [key for key in settings if key == "weights" or key not in options]:
        del settings[key]
    if is_main_process():
        note(f"note: --method {chosen} has its own loss weights; those of recipe {recipe} are left out")


def _overlay(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Let stronger settings override weaker ones; epochs also override weaker steps."""
    from declip_cli.config_files import merge_into

    train = changes.get("train", {})
    if isinstance(train, dict) and train.get("epochs") and "steps" not in train:
        merge_into(settings, {"train": {"steps": 0}})
    merge_into(settings, changes)


def _new_run(sources: _Sources, out: Path | None) -> "tuple[Path, RunConfig]":
    from declip_cli.config import RunConfig
    from declip_cli.config_files import build_config
    from declip_cli.errors import ConfigError
    from declip_cli.model.checkpoint import runs_root
    from declip_cli.train.run_dir import default_run_dir

    config = build_config(RunConfig, _settings(sources))
    if not config.data.path:
        raise ConfigError("no data to train on", remedy="--data shards/ (made by declip prepare), or --data demo")
    path = out or default_run_dir(runs_root(), method=config.method.name, arch=config.model.arch)
    return path, config


def _resumed_config(sources: _Sources, path: Path) -> "RunConfig":
    from dataclasses import asdict

    from declip_cli.config import RunConfig
    from declip_cli.config_files import build_config
    from declip_cli.train.run_dir import RunDir

    settings = asdict(RunDir(path).read_config())
    _overlay(settings, _settings(sources, is_new=False))
    return build_config(RunConfig, settings)


def _work(config: "RunConfig", path: Path, is_resumed: bool) -> dict[str, Any]:
    """Train in this process and return the result to print."""
    from declip_cli.cli.progress import RunProgress
    from declip_cli.evaluate.during_training import make_evaluator
    from declip_cli.train.session import pretrain as run

    evaluate = make_evaluator(config.train.eval, data_root=None) if config.train.eval else None
    report: StepReport | None = None
    with RunProgress(config) as progress:
        for report in run(config, path, is_resumed=is_resumed, evaluate=evaluate, say=note):
            progress.show(report)
    assert report is not None  # a run always ends with a report
    progress.close(report, path)
    return {
        "run_dir": str(path),
        "method": config.method.name,
        "arch": config.model.arch,
        "steps": report.step,
        "samples_seen": report.samples_seen,
        "seconds": report.seconds,
        "samples_per_second": report.samples_seen / max(report.seconds, 1e-9),
        "losses": progress.last_losses,
        "evaluations": report.evaluations,
        "stopped": report.was_stopped,
    }
