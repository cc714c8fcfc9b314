"""Put a run together: hardware, data, method, optimizers."""

import importlib.util
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from declip_cli.config import RunConfig, TrainConfig
from declip_cli.cores import own_cores
from declip_cli.data.dataset import Dataset
from declip_cli.data.loader import StreamConfig
from declip_cli.data.stream import TrainStream
from declip_cli.distributed import copy_from_main, rank, world_size
from declip_cli.errors import TrainError, require
from declip_cli.gradient_average import GradientAverage
from declip_cli.methods.base import Method
from declip_cli.methods.registry import build_method
from declip_cli.model.batch_norm import use_full_batch_norm
from declip_cli.model.precision import has_native_bf16
from declip_cli.process_group import from_all
from declip_cli.resolve import Machine, ResolvedRun, settled
from declip_cli.train.batches import DeviceBatches
from declip_cli.train.compiled import Compilation
from declip_cli.train.optim import Schedule, WeightAverage, build_optimizers, schedule_of
from declip_cli.train.start import start_from


@dataclass(slots=True, kw_only=True)
class Training:
    """All parts of a run, ready for the loop."""

    run: ResolvedRun
    accelerator: Accelerator
    method: Method
    compilation: Compilation
    """Of the method."""
    stream: TrainStream
    batches: DeviceBatches
    """Those of the stream, on the device."""
    optimizers: list[torch.optim.Optimizer]
    gradient_average: GradientAverage
    """Over the ranks."""
    average: WeightAverage | None
    """Over the steps."""
    schedule: Schedule
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    """Since the run began, interruptions left out."""
    startup_seconds: float = 0.0
    """Of these, up to the end of a session's first step: compiling, filling the loader."""
    step_seconds: float = 0.0
    """Of these, spent in steps: evaluations and savings left out."""
    num_rollbacks: int = 0
    tracked_runs: dict[str, str] = field(default_factory=dict)
    """Tracker → its name of this run, under which a resumed session continues."""
    bad_steps: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    """Broken batches in all, and in a row up to now; on the device, int64, (2,)."""

    @property
    def config(self) -> RunConfig:
        """The settings, all resolved."""
        return self.run.config

    @property
    def clip_norm(self) -> float:
        """Largest joint norm of the gradients; inf never clips."""
        return settled(self.config.optim.gradient_clip_norm)

    @property
    def logit_scale_bounds(self) -> tuple[float, float]:
        """Lowest and highest logarithm of the logit scales."""
        return settled(self.config.train.logit_scale_min), settled(self.config.train.logit_scale_max)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run at today's global batch."""
        return self.run.total_steps(step=self.step, samples_seen=self.samples_seen)


def find_machine(config: RunConfig, *, num_processes: int | None = None) -> Machine:
    """Choose device, number format and threads of this rank; `num_processes` None: those there are.

    Raises:
        TrainError: the device or the precision is not available.
    """
    device = find_device(config.train)
    precision = config.train.precision
    if precision == "auto":
        has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        precision = "bf16" if has_native_bf16(device) else "fp16" if has_tensor_cores else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise TrainError(f"fp16 needs a GPU (found {device.type})", remedy="--precision bf16 or --precision fp32")
    cores = count_cores(num_processes or 1)
    threads = config.train.threads or cores
    workers = config.data.workers
    if workers is None:
        workers = min(16, threads) if device.type == "cuda" else 1
    return Machine(
        world_size=num_processes or world_size(),
        device=device.type,
        precision=precision,
        cores=cores,
        threads=threads,
        workers=workers,
        loader=config.data.loader or ("processes" if device.type == "cuda" else "threads"),
    )


def find_device(train: TrainConfig) -> torch.device:
    """Find the kind of device that `train.device` means here."""
    kind = train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(kind, True):
        raise TrainError(f"train.device is {kind}, which this machine does not have", remedy="--set train.device=cpu")
    if kind == "cuda" and world_size() > 1 and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainError(
            "LOCAL_RANK is not set, so all processes of a machine would take the same GPU",
            remedy="start them with torchrun or accelerate launch, or set LOCAL_RANK for each",
        )
    return torch.device(kind)


def count_cores(num_local: int = 1) -> int:
    """Count the cores that are this process's own.

    `srun` may already have bound each rank to its share; ranks that share the same cores share them evenly: those
    there are, or else the `num_local` that will be started here.
    """
    mine = own_cores()
    if world_size() > 1:
        num_local = from_all((socket.gethostname(), mine)).count((socket.gethostname(), mine))
    return max(1, len(mine) // num_local)


def build_training(run: ResolvedRun, samples: Dataset, *, path: Path, is_resumed: bool = False) -> Training:
    """Make everything a run needs, on its device, with the same random weights on every rank.

    Args:
        run: resolved.
        samples: its pairs.
        path: the run folder, for trackers.
        is_resumed: a saved state follows, so `train.init` is not read again.

    Raises:
        DeclipError: data, model or options cannot be used.
    """
    config = run.config
    # TF32 is what float32 meant in the original's PyTorch; other devices have none.
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    os.environ.setdefault("OMP_NUM_THREADS", str(run.machine.threads))  # else Accelerate chooses on CPUs, and warns
    accelerator = _build_accelerator(run, path)
    torch.set_num_threads(run.machine.threads)
    torch.manual_seed(config.train.seed)
    method = build_method(config.model, config.method)
    _start_logits(method, config.train)
    if config.train.init and not is_resumed:
        start_from(method, config)
    stream = _build_stream(run, samples, method, accelerator)
    method.to(accelerator.device)
    if world_size() > 1 and config.method.batch_norm == "global":
        use_full_batch_norm(method, is_accelerator=accelerator.device.type == "cuda")
    _freeze(method, config)
    copy_from_main(list(method.parameters()) + list(method.buffers()))
    decay = config.train.ema_decay
    return Training(
        run=run,
        accelerator=accelerator,
        method=method,
        compilation=Compilation(method, run),
        stream=stream,
        batches=DeviceBatches(stream, accelerator.device),
        optimizers=build_optimizers(method, config),
        gradient_average=GradientAverage(method.parameters()),
        average=WeightAverage(method.encoder, decay=decay) if decay else None,
        schedule=schedule_of(run),
        bad_steps=torch.zeros(2, dtype=torch.int64, device=accelerator.device),
    )


@torch.no_grad()
def _start_logits(method: Method, train: TrainConfig) -> None:
    for name, parameter in method.named_parameters():
        if "logit_scale" in name and name != "logit_scale_strong":  # rocket's, of its own
            parameter.fill_(settled(train.logit_scale_init))
        elif "logit_bias" in name:
            parameter.fill_(settled(train.logit_bias_init))


def _build_accelerator(run: ResolvedRun, path: Path) -> Accelerator:
    tracker = run.config.train.tracker
    if tracker and importlib.util.find_spec(tracker) is None:
        raise TrainError(
            f"train.tracker is {tracker}, which is not installed", remedy=f"pip install 'declip[{tracker}]'"
        )
    return Accelerator(
        cpu=run.machine.device == "cpu",
        mixed_precision={"fp32": "no"}.get(run.machine.precision, run.machine.precision),
        log_with=tracker,
        project_dir=str(path),
    )


def _build_stream(run: ResolvedRun, samples: Dataset, method: Method, accelerator: Accelerator) -> TrainStream:
    config, architecture = run.config, method.encoder.architecture
    return TrainStream(
        samples,
        StreamConfig(
            views=method.views,
            augment=config.augment,
            side_px=architecture.image_side_px,
            context_length=architecture.text.context_length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rank=rank(),
            world_size=world_size(),
            workers=run.machine.workers,
            loader=run.machine.loader,  # type: ignore[arg-type]
            order=settled(config.data.order),
            num_streams=config.data.streams or 1,
            open_blocks=config.data.open_blocks,
            mask_special_ids=bool(config.method.mask_special_ids),
            num_captions=config.method.captions,
            compare_captions=config.method.positives == "caption",
            max_bad=config.data.max_bad,
            pin_memory=accelerator.device.type == "cuda",
        ),
    )


def _freeze(method: Method, config: RunConfig) -> None:
    for tower in config.train.freeze:
        (method.encoder.visual if tower == "image" else method.encoder.text).requires_grad_(False)
    if config.optim.logit_scale_learning_rate == 0:  # else its gradient would pile up and count in the clipped norm
        for name, parameter in method.named_parameters():
            if "logit_" in name:
                parameter.requires_grad_(False)
    require(
        any(parameter.requires_grad for parameter in method.parameters()),
        "everything is frozen, nothing is left to train",
        remedy="freeze one tower only: --set train.freeze=image",
    )
