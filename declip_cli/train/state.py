"""All that a run needs to go on bit for bit: taken out of the parts of a run, and put back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.distributed import rank, world_size
from declip_cli.errors import TrainError
from declip_cli.train.health import check_finite_weights
from declip_cli.train.run_dir import SavedState, optimizer_tensors, restore_optimizers
from declip_cli.train.setup import Training


def capture_state(training: Training) -> SavedState:
    """Collect the state of a run; call it on every rank.

    Args:
        training: the parts.

    Returns:
        What rank 0 writes.

    Raises:
        TrainError: a weight is no number any more; such a state is not worth keeping.
    """
    check_finite_weights(training.method, step=training.step, run_dir=str(training.accelerator.project_dir))
    tensors = {
        "method": dict(training.method.state_dict()),
        "optimizer": optimizer_tensors(training.optimizers),
        "random": {"cpu": torch.get_rng_state()},
        "rank_queues": _queues_of_ranks(training),
    }
    if training.accelerator.device.type == "cuda":
        tensors["random"]["cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {
        "samples_seen": training.samples_seen,
        "seconds": training.seconds,
        "stream": training.stream.state(),
        "world_size": world_size(),
    }
    if training.average is not None:
        tensors["average"] = training.average.state
        values["average_updates"] = training.average.num_updates
    if training.accelerator.scaler is not None:
        values["scaler"] = training.accelerator.scaler.state_dict()
    return SavedState(step=training.step, tensors=tensors, values=values)


def restore_state(training: Training, state: SavedState) -> None:
    """Put a saved state back; the next step is the one that would have come.

    Args:
        training: freshly built from the run's configuration.
        state: from `RunDir.load_state`.

    Raises:
        TrainError: the state does not fit the configuration.
    """
    device = training.accelerator.device
    try:
        training.method.load_state_dict(state.tensors["method"])
        restore_optimizers(training.optimizers, state.tensors["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainError(
            f"the saved state does not fit the configuration: {error}",
            remedy="resume with the options the run was started with",
        ) from error
    queues = state.tensors.get("rank_queues", {})
    if queues and state.values["world_size"] == world_size():
        training.method.get_submodule("queue").load_state_dict(
            {name: values[rank()].to(device) for name, values in queues.items()}
        )
    if training.average is not None:
        weights = state.tensors.get("average", training.method.encoder.state_dict())  # switched on only now
        training.average.restore(weights, state.values.get("average_updates", 0))
    if training.accelerator.scaler is not None and "scaler" in state.values:
        training.accelerator.scaler.load_state_dict(state.values["scaler"])
    torch.set_rng_state(state.tensors["random"]["cpu"])
    if "cuda" in state.tensors["random"] and device.type == "cuda":
        torch.cuda.set_rng_state(state.tensors["random"]["cuda"])
    training.stream.restore(state.values["stream"])
    training.step, training.samples_seen = state.step, state.values["samples_seen"]
    training.seconds = state.values["seconds"]


def _queues_of_ranks(training: Training) -> dict[str, Tensor]:
    """Gather the queues of the faithful mode, where each rank has its own; nothing where they are alike."""
    if world_size() == 1 or not training.config.method.faithful or not hasattr(training.method, "queue"):
        return {}
    queues = {}
    for name, value in training.method.get_submodule("queue").state_dict().items():
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value)
        queues[name] = torch.stack(parts)
    return queues
