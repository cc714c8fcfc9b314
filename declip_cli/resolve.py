"""A run as one resolved object: what was asked, merged and checked, and every number that follows from it."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from declip_cli.config import MethodConfig, OptimConfig, RunConfig, TrainConfig
from declip_cli.config_files import (
    build_config,
    load_recipe,
    merge_into,
    parse_assignments,
    read_settings,
    recipe_of_data,
    to_plain,
    with_new_names,
)
from declip_cli.errors import ConfigError, require
from declip_cli.methods.registry import METHODS
from declip_cli.model.architectures import OF_INIT, resolve_model
from declip_cli.presets import PRESETS, resolve_data, resolve_switches

T = TypeVar("T")

PAPER_EPOCHS = 32
_PEAK_AT_4096 = 1e-3
_WARMUP_STEPS = 2500
_OF_ARCHITECTURE = ("architecture", "image_side_px", "context_length", "embed_dim", "quick_gelu", "resize_px")
_DEPENDENT = {
    ("optim", "learning_rate_peak"): (("optim", "learning_rate_start"),),
    ("optim", "warmup_steps"): (("optim", "warmup_samples"), ("optim", "warmup_in_full")),
    ("train", "steps"): (("train", "samples"),),
    ("train", "epochs"): (("train", "samples"),),
    ("model", "arch"): tuple(("model", key) for key in _OF_ARCHITECTURE),
    ("model", "image_side_px"): (("model", "resize_px"),),
}
"""Settings that are resolved again when a run is resumed with another one changed."""
_SWITCHES = tuple((section, key) for section, values in PRESETS.items() for key in values)
_DEPENDENT |= dict.fromkeys([("method", "name"), ("method", "faithful")], (("method", "weights"), *_SWITCHES))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """What the data adds to a configuration."""

    num_pairs: int
    fingerprint: str
    num_blocks: int = 0
    """Pieces that are read as one."""
    suits_blocks: bool = False
    """It is remote, or more than the memory can hold."""
    is_counted: bool = True
    """False of archives that nobody has indexed: `num_pairs` is an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the hardware adds to a configuration."""

    world_size: int
    device: str
    precision: str
    """fp32, bf16 or fp16."""
    cores: int
    """Cores of this process."""
    threads: int
    workers: int
    """Loader threads, in this process or, if `loader` is processes, in others."""
    loader: str = "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """Everything a run does, settled: what is printed, saved, hashed and resumed."""

    asked: RunConfig
    """What recipe, file and options said; None where they said nothing."""
    config: RunConfig
    """The same with every number resolved that decides the result; what only concerns the machine stays as asked."""
    data: DataFacts
    machine: Machine
    schedule_batch: int
    """Pairs of the first step, in which the schedule is laid out: the global batch that the run began with."""

    @property
    def global_batch(self) -> int:
        """Pairs per step on all processes together."""
        return self.config.train.batch_size * self.machine.world_size

    def total_steps(self, *, step: int = 0, samples_seen: int = 0) -> int:
        """Count the steps of the whole run, from where it stands, at this global batch."""
        samples: int = settled(self.config.train.samples)
        return step + math.ceil((samples - samples_seen) / self.global_batch)

    @property
    def digest(self) -> str:
        """Name what decides the result: sha256 of settled settings, data and batch, its first 16 digits."""
        train = replace(self.config.train, threads=None, processes=None, tracker=None, device="auto", compile=False)
        train = replace(train, init=None, time_limit_s=None)
        data = replace(self.config.data, workers=None, loader=None, cache_dir=None, cache_gb=0)
        settings = replace(self.config, train=train, data=data)
        content = [to_plain(settings), asdict(self.data), self.schedule_batch]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as nested plain values, fit for JSON."""
        facts = asdict(self.data) | asdict(self.machine)
        facts |= {"global_batch": self.global_batch, "schedule_batch": self.schedule_batch}
        facts |= {"total_steps": self.total_steps(), "digest": self.digest}
        return {"asked": to_plain(self.asked), "config": to_plain(self.config), "run": facts}


def resolved_from_json(content: Mapping[str, Any]) -> ResolvedRun:
    """Read what `ResolvedRun.to_json` returned.

    Raises:
        ConfigError: a setting is unknown or out of range.
        KeyError: something is missing.
    """
    run = content["run"]
    return ResolvedRun(
        asked=build_config(RunConfig, with_new_names(content["asked"])[0]),
        config=build_config(RunConfig, with_new_names(content["config"])[0]),
        data=DataFacts(**{key: run[key] for key in DataFacts.__dataclass_fields__ if key in run}),
        machine=Machine(**{key: run[key] for key in Machine.__dataclass_fields__ if key in run}),
        schedule_batch=int(run["schedule_batch"]),
    )


def resolve_run(
    recipe: str | None,
    file: Path | None,
    options: Mapping[str, Mapping[str, Any]],
    assignments: Iterable[str],
    *,
    before: RunConfig | None = None,
) -> tuple[RunConfig, list[str]]:
    """Merge what was asked, weakest first: the run before or the recipe, the file, options, assignments.

    However the method is named (`--method`, `--set method.name=`, `[method] name`), a recipe for another one lends
    only what both have: its loss weights are its own.

    Args:
        recipe: name of a recipe; where neither recipe nor file is named, data may bring their own.
        file: TOML with the sections of `RunConfig`, or the `config.json` of a run.
        options: section → key → value, of the command line's options; None was not given.
        assignments: words `section.key=value`.
        before: what a run that is resumed was asked.

    Returns:
        The configuration, checked, and notes on what was left out or changes nothing.

    Raises:
        ConfigError: a name, key, type or value cannot be used.
    """
    given = {section: {k: v for k, v in values.items() if v is not None} for section, values in options.items()}
    if recipe is None and file is None and before is None:
        recipe = recipe_of_data(given.get("data", {}).get("path"))
    settings = to_plain(before) if before is not None else load_recipe(recipe) if recipe is not None else {}
    whose = f"recipe {recipe}" if recipe is not None else "the run so far"
    notes, requested = list[str](), dict[str, Any]()
    from_file = read_settings(file) if file is not None else {}
    for source, name in ((from_file, str(file)), (given, ""), (parse_assignments(assignments), "")):
        part, renamed = with_new_names(source)
        notes += renamed + _leave_out_other_method(settings, part, whose=whose)
        _overlay(settings, part)
        if file is None or name != str(file) or file.suffix != ".json":  # that one says everything
            _overlay(requested, part)
        whose = name if "method" in part and name else whose
    if recipe is not None and requested.get("model", {}).get("arch") == OF_INIT:
        settings["model"] = requested["model"]  # the recipe's sizes are of another model
    config = build_config(RunConfig, settings)
    return config, notes + list(_ignored(requested, config))


def _overlay(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Let stronger settings override weaker ones; the length of a run is one of three settings."""
    lengths = ("samples", "steps", "epochs")
    train = changes.get("train", {})
    if isinstance(train, Mapping) and any(train.get(key) not in (None, "none") for key in lengths):
        merge_into(settings, {"train": dict.fromkeys(lengths)})
    merge_into(settings, changes)


def _leave_out_other_method(settings: dict[str, Any], requested: Mapping[str, Any], *, whose: str) -> list[str]:
    """Drop from settings of another method what the chosen one does not have, and the loss weights."""
    method = settings.get("method", {})
    chosen = requested.get("method", {}).get("name") if isinstance(requested.get("method", {}), Mapping) else None
    if not method or chosen in (None, method.get("name", MethodConfig().name)) or chosen not in METHODS:
        return []
    for key in [key for key in method if key == "weights" or key not in METHODS[chosen].options]:
        del method[key]
    return [f"note: method {chosen} has its own loss weights; those of {whose} are left out"]


def _ignored(requested: Mapping[str, Any], config: RunConfig) -> Iterable[str]:
    """Name settings that were given but change nothing."""
    for key in requested.get("method", {}):
        if key not in METHODS[config.method.name].options:
            yield f"note: method {config.method.name} does not use method.{key}"
    if requested.get("train", {}).get("eval_every_steps") and not config.train.eval:
        yield "note: train.eval_every_steps changes nothing without --eval"


def resolve(
    asked: RunConfig,
    *,
    data: DataFacts,
    machine: Machine,
    before: ResolvedRun | None = None,
    step: int = 0,
    samples_seen: int = 0,
) -> ResolvedRun:
    """Resolve every number of a run.

    Args:
        asked: from `resolve_run`.
        data: how much there is to learn from.
        machine: what it runs on.
        before: the run that is resumed: what it settled stays, unless it was changed or depends on what was.
        step: steps it has taken.
        samples_seen: pairs it has seen.

    Raises:
        ConfigError: the settings do not fit each other or the data.
    """
    config = kept_settings(asked, before) if before is not None else asked
    global_batch = config.train.batch_size * machine.world_size
    schedule_batch = before.schedule_batch if before is not None else global_batch
    is_faithful = config.method.faithful
    method = resolve_switches("method", config.method, is_faithful=is_faithful)
    samples = _length(config, global_batch, data, step=step, samples_seen=samples_seen)
    optim = _resolve_optim(config.optim, samples=samples, global_batch=global_batch, schedule_batch=schedule_batch)
    whole = RunConfig(
        model=resolve_model(config.model),
        data=resolve_data(
            config.data, data.num_blocks, global_batch, suits_blocks=data.suits_blocks and before is None
        ),
        augment=config.augment,
        method=replace(method, weights=METHODS[method.name].default_weights | method.weights),
        optim=resolve_switches("optim", optim, is_faithful=is_faithful),
        train=_resolve_train(config, samples=samples, global_batch=global_batch, precision=machine.precision),
    )
    return ResolvedRun(asked=asked, config=whole, data=data, machine=machine, schedule_batch=schedule_batch)


def _resolve_train(config: RunConfig, *, samples: int, global_batch: int, precision: str) -> TrainConfig:
    train = replace(config.train, samples=samples, steps=None, epochs=None, precision=precision)  # type: ignore[arg-type]
    train = resolve_switches("train", train, is_faithful=config.method.faithful)
    is_sigmoid = config.method.contrastive == "sigmoid"
    if train.logit_scale_init is None:
        train = replace(train, logit_scale_init=math.log(10.0 if is_sigmoid else 1 / 0.07))
    if train.logit_bias_init is None and is_sigmoid:
        train = replace(train, logit_bias_init=-math.log(global_batch))
    low, high = settled(train.logit_scale_min), settled(train.logit_scale_max)
    require(
        low <= high,
        f"train.logit_scale_min must not exceed train.logit_scale_max (got {low}, {high})",
        remedy="--set train.logit_scale_max=4.6052",
    )
    return train


def kept_settings(asked: RunConfig, before: ResolvedRun) -> RunConfig:
    """Take over what the run before settled, but for what was changed now and what depends on it."""
    old, new, settings = to_plain(before.asked), to_plain(asked), to_plain(before.config)
    changed = [(section, key) for section in new for key in new[section] if new[section][key] != old[section][key]]
    for section, key in [*changed, *(other for one in changed for other in _DEPENDENT.get(one, ()))]:
        settings[section][key] = new[section][key]
    return build_config(RunConfig, settings)


def _length(config: RunConfig, global_batch: int, data: DataFacts, *, step: int, samples_seen: int) -> int:
    """Count the pairs that the run sees in all."""
    train = config.train
    if train.samples is not None:
        return train.samples
    if train.steps is not None:
        require(
            train.steps > step or step == 0,
            f"--steps must be more than the {step} that the run has taken (got {train.steps})",
            remedy=f"--steps {2 * step}",
        )
        return samples_seen + (train.steps - step) * global_batch
    steps_per_epoch = data.num_pairs // global_batch
    if steps_per_epoch == 0:
        return global_batch  # the loader explains that the data are fewer than one batch
    epochs = PAPER_EPOCHS if train.epochs is None else train.epochs
    samples = round(epochs * steps_per_epoch) * global_batch
    require(samples >= 1, "the run has no step", remedy="--steps 1000 or --epochs 32")
    return samples


def _resolve_optim(optim: OptimConfig, *, samples: int, global_batch: int, schedule_batch: int) -> OptimConfig:
    peak = optim.learning_rate_peak
    if peak is None:
        require(
            optim.optimizer == "adamw",
            "optim.optimizer = sgd has no default learning rate",
            remedy="--learning-rate 0.2 (the original's at 88 M pairs), or another",
        )
        peak = _PEAK_AT_4096 * math.sqrt(global_batch / 4096)
    warmup = optim.warmup_samples
    is_asked = warmup is not None or optim.warmup_steps is not None
    if warmup is None and optim.warmup_steps is not None:
        warmup = optim.warmup_steps * schedule_batch
    if warmup is None:
        warmup = min(_WARMUP_STEPS, samples // schedule_batch // 10) * schedule_batch
    require(
        warmup < samples or samples <= schedule_batch,
        f"optim.warmup_steps must be less than the steps of the run (got {warmup / schedule_batch:g}, "
        f"{samples / schedule_batch:g})",
        remedy=f"--set optim.warmup_steps={samples // schedule_batch // 10}",
    )
    return replace(
        optim,
        learning_rate_peak=peak,
        learning_rate_start=peak / 10 if optim.learning_rate_start is None else optim.learning_rate_start,
        warmup_samples=warmup,
        warmup_in_full=is_asked if optim.warmup_in_full is None else optim.warmup_in_full,
        warmup_steps=None,
    )


def settled(value: T | None) -> T:
    """Take a value of a resolved run out of its optional type."""
    if value is None:
        raise ConfigError("the run is not resolved yet", remedy="call resolve() first")
    return value
