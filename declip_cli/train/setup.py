"""Put a run together: processes, device, precision, data, method, optimizers."""

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from declip_cli.config import RunConfig
from declip_cli.config_checks import require
from declip_cli.data.stores import open_samples
from declip_cli.data.stream import StreamConfig, TrainStream
from declip_cli.distributed import copy_from_main
from declip_cli.errors import TrainError
from declip_cli.methods.base import Method
from declip_cli.methods.registry import build_method
from declip_cli.model.batch_norm import use_full_batch_norm
from declip_cli.model.checkpoint import load_model
from declip_cli.model.precision import has_native_bf16
from declip_cli.train.ema import WeightAverage
from declip_cli.train.optim import build_optimizers, logit_scale_bounds, warmup_length

_PAPER_EPOCHS = 32


@dataclass(slots=True, kw_only=True)
class Training:
    """All parts of a run, ready for the loop."""

    config: RunConfig
    accelerator: Accelerator
    precision: str
    method: Method
    stream: TrainStream
    optimizers: list[torch.optim.Optimizer]
    average: WeightAverage | None
    total_steps: int
    warmup_steps: int
    bounds: tuple[float, float]
    num_workers: int
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0


def build_training(config: RunConfig, *, run_path: Path, is_resumed: bool = False) -> Training:
    """Make everything a run needs.

    Args:
        config: the run.
        run_path: the run folder, for trackers.
        is_resumed: a saved state follows, so `train.init` is not read again.

    Returns:
        The parts, on their device, with the same random weights on every rank.

    Raises:
        DeclipError: data, model or options cannot be used.
    """
    accelerator = build_accelerator(config, run_path=run_path)
    workers = set_threads(config)
    torch.manual_seed(config.train.seed)
    method = build_method(config.model, config.method)
    if config.train.init and not is_resumed:
        _start_from(method, config)
    with torch.no_grad():
        if not config.train.init:
            method.encoder.logit_scale.fill_(config.train.logit_scale_init)
    stream = _build_stream(config, method, accelerator, workers)
    method.to(accelerator.device)
    if accelerator.num_processes > 1 and not config.method.faithful:
        use_full_batch_norm(method, is_accelerator=accelerator.device.type == "cuda")
    _freeze(method, config)
    copy_from_main(list(method.parameters()) + list(method.buffers()))
    if config.train.compile:
        method.encoder.visual.compile()
        method.encoder.text.compile()
    total_steps = config.train.steps or round((config.train.epochs or _PAPER_EPOCHS) * stream.steps_per_epoch)
    require(total_steps >= 1, "the run has no step", remedy="--steps 1000 or --epochs 32")
    decay = config.train.ema_decay
    return Training(
        config=config,
        accelerator=accelerator,
        precision=accelerator.mixed_precision,
        method=method,
        stream=stream,
        optimizers=build_optimizers(method, config),
        average=WeightAverage(method.encoder, decay=decay) if decay else None,
        total_steps=total_steps,
        warmup_steps=warmup_length(config.optim, total_steps),
        bounds=logit_scale_bounds(config),
        num_workers=workers,
    )


def build_accelerator(config: RunConfig, *, run_path: Path) -> Accelerator:
    """Join the processes there are and settle device and precision.

    Args:
        config: `train.device`, `train.precision`, `train.tracker`.
        run_path: where a tracker may write.

    Returns:
        Accelerate's handle.

    Raises:
        TrainError: the device or the precision is not to be had here.
    """
    train = config.train
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if train.device == "auto"
        else torch.device(train.device)
    )
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, True)
    if not is_there:
        raise TrainError(
            f"train.device is {device.type}, which this machine does not have", remedy="--set train.device=cpu"
        )
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}.get(train.precision, "")
    if not precision:
        precision = "bf16" if has_native_bf16(device) else "no"
    if precision == "fp16" and device.type != "cuda":
        raise TrainError(f"fp16 needs a GPU (found {device.type})", remedy="--precision bf16 or --precision fp32")
    package = train.tracker and importlib.util.find_spec(train.tracker)
    if train.tracker and not package:
        raise TrainError(
            f"train.tracker is {train.tracker}, which is not installed", remedy=f"pip install {train.tracker}"
        )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=train.tracker or None,
        project_dir=str(run_path),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )


def set_threads(config: RunConfig) -> int:
    """Share the CPU threads between computing and loading.

    On a CPU all threads compute and the loader's share their cores, since it is idle most of the time; beside a GPU
    the cores are the loader's.

    Returns:
        Loader threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.train.threads or max(1, cores // local_processes)
    torch.set_num_threads(threads)
    if config.data.workers >= 0:
        return config.data.workers
    return min(16, threads) if torch.cuda.is_available() else 1


def _build_stream(config: RunConfig, method: Method, accelerator: Accelerator, workers: int) -> TrainStream:
    require(bool(config.data.path), "no data to train on", remedy="--data shards/ or --data demo")
    samples = open_samples(config.data.path, part=config.data.part, cache_dir=config.data.cache_dir)
    architecture = method.encoder.architecture
    return TrainStream(
        samples,
        StreamConfig(
            views=method.views,
            augment=config.augment,
            side_px=architecture.image_side_px,
            context_length=architecture.text.context_length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=workers,
            mask_special_ids=bool(settle_method(config.method).mask_special_ids),
            max_bad=config.data.max_bad,
            pin_memory=accelerator.device.type == "cuda",
        ),
    )


def _start_from(method: Method, config: RunConfig) -> None:
    start = load_model(Path(config.train.init))
    theirs, ours = start.encoder.state_dict(), method.encoder.state_dict()
    wrong = [name for name, value in ours.items() if name in theirs and theirs[name].shape != value.shape]
    missing = [name for name in ours if name not in theirs and not name.startswith("token_wise.")]
    if wrong or missing:
        raise TrainError(
            f"--init {config.train.init} does not fit --arch {config.model.arch}: {(wrong + missing)[0]} differs",
            remedy="choose the architecture (and model.image_side_px, model.context_length) that it was trained with",
        )
    method.encoder.load_state_dict(ours | {name: theirs[name] for name in ours if name in theirs})


def _freeze(method: Method, config: RunConfig) -> None:
    for tower in config.train.freeze:
        (method.encoder.visual if tower == "image" else method.encoder.text).requires_grad_(False)
    if config.optim.logit_scale_learning_rate == 0:  # else its gradient would pile up and count in the clipped norm
        for name, parameter in method.named_parameters():
            if "logit_scale" in name:
                parameter.requires_grad_(False)
    require(
        any(parameter.requires_grad for parameter in method.parameters()),
        "everything is frozen, nothing is left to train",
        remedy="freeze one tower only: --set train.freeze=image",
    )
