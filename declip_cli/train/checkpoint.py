"""All that a run needs to go on bit for bit, by name: taken out of its parts, and put back as far as it fits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.distributed import rank, world_size
from declip_cli.errors import TrainError
from declip_cli.train.build import Training
from declip_cli.train.run_dir import SavedState


def capture_state(training: Training) -> SavedState:
    """Collect the state of a run; call it on every rank.

    Args:
        training: the parts.

    Returns:
        What rank 0 writes.
    """
    tensors = {
        "method": dict(training.method.state_dict()),
        "optimizer": _optimizer_tensors(training),
        "random": {"cpu": torch.get_rng_state()},
        "rank_queues": _queues_of_ranks(training),
    }
    if training.accelerator.device.type == "cuda":
        tensors["random"]["cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {
        "samples_seen": training.samples_seen,
        "seconds": training.seconds,
        "startup_seconds": training.startup_seconds,
        "step_seconds": training.step_seconds,
        "num_rollbacks": training.num_rollbacks,
        "bad_steps": training.bad_steps.tolist(),
        "tracked_runs": training.tracked_runs,
        "stream": training.stream.state(),
        "pixels": [training.method.encoder.pixel_mean.tolist(), training.method.encoder.pixel_std.tolist()],
        "world_size": world_size(),
        "trained": _trained_names(training),
    }
    if training.average is not None:
        tensors["average"] = training.average.state
        values["average_updates"] = training.average.num_updates
    if training.accelerator.scaler is not None:
        values["scaler"] = training.accelerator.scaler.state_dict()
    return SavedState(step=training.step, tensors=tensors, values=values)


def restore_state(training: Training, state: SavedState) -> list[str]:
    """Put a saved state back; the next step is the one that would have come.

    Weights and moments are matched by name and shape. What a changed method or option brings along starts anew.

    Args:
        training: freshly built from the run's configuration.
        state: from `RunDir.load_state`.

    Returns:
        What started anew or was dropped, a sentence each; nothing where the settings are the same.

    Raises:
        TrainError: the encoder is another one.
        DataError: the data are others.
    """
    notes = _restore_method(training, state.tensors["method"])
    notes += _restore_optimizers(training, state.tensors["optimizer"], state.values["trained"])
    notes += _restore_queues(training, state)
    device, values = training.accelerator.device, state.values
    if training.average is not None:
        # What the saved average lacks, because it or the method is new, starts from the weights as they are now.
        weights = training.method.encoder.state_dict() | state.tensors.get("average", {})
        training.average.restore(weights, values.get("average_updates", 0))
    if training.accelerator.scaler is not None and "scaler" in values:
        training.accelerator.scaler.load_state_dict(values["scaler"])
    mean, deviation = values["pixels"]  # of the model that the run started from
    training.method.encoder.pixel_mean.copy_(torch.tensor(mean))
    training.method.encoder.pixel_std.copy_(torch.tensor(deviation))
    torch.set_rng_state(state.tensors["random"]["cpu"])
    if "cuda" in state.tensors["random"] and device.type == "cuda":
        torch.cuda.set_rng_state(state.tensors["random"]["cuda"])
    training.stream.restore(values["stream"])
    training.step, training.samples_seen = state.step, values["samples_seen"]
    training.seconds, training.startup_seconds = values["seconds"], values["startup_seconds"]
    training.step_seconds = values["step_seconds"]
    training.num_rollbacks = values["num_rollbacks"]
    training.tracked_runs = values.get("tracked_runs", training.tracked_runs)
    training.bad_steps.copy_(torch.tensor(values["bad_steps"]))
    return notes


def _restore_method(training: Training, saved: dict[str, Tensor]) -> list[str]:
    own = training.method.state_dict()
    unfit = {name for name, value in own.items() if name not in saved or saved[name].shape != value.shape}
    encoder = sorted(name for name in unfit if name.startswith("encoder.") and ".token_wise." not in name)
    if encoder:
        raise TrainError(
            f"the saved state does not fit the configuration: {encoder[0]} differs",
            remedy="resume with the model options the run was started with, or start a new run with --init",
        )
    # A head or a queue of which one part does not fit starts anew as a whole.
    anew = {_part_of(name) for name in unfit}
    fitting = {name: saved[name] for name in own if _part_of(name) not in anew}
    training.method.load_state_dict(own | fitting)
    gone = {_part_of(name) for name in saved} - {_part_of(name) for name in own}
    notes = [f"{_list(anew)} of the method starts anew: the saved state has none that fits"] if anew else []
    return notes + ([f"{_list(gone)} of the saved state is not used by this method"] if gone else [])


def _part_of(name: str) -> str:
    """Name the part of a method that a tensor belongs to: its encoder, its token-wise heads, a head, its queue."""
    return "encoder.token_wise" if name.startswith("encoder.token_wise.") else name.split(".")[0]


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    """Flatten the state of the optimizers: `encoder.visual.proj.exp_avg` and so on."""
    names = {id(parameter): name for name, parameter in training.method.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for optimizer in training.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _trained_names(training: Training) -> list[str]:
    names = {id(parameter): name for name, parameter in training.method.named_parameters()}
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _restore_optimizers(training: Training, saved: dict[str, Tensor], trained: list[str]) -> list[str]:
    names = {id(parameter): name for name, parameter in training.method.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = {}
    for dotted, value in saved.items():
        name, _, key = dotted.rpartition(".")
        moments.setdefault(name, {})[key] = value
    anew: list[str] = []
    for optimizer in training.optimizers:
        is_adamw = isinstance(optimizer, torch.optim.AdamW)
        kinds = {"exp_avg", "exp_avg_sq", "step"} if is_adamw else {"momentum_buffer"}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {}
        for index, parameter in enumerate(parameters):  # the order in which load_state_dict numbers them
            name = names[id(parameter)]
            found = moments.pop(name, {})
            if set(found) == kinds and all(key == "step" or v.shape == parameter.shape for key, v in found.items()):
                state[index] = found
            else:
                if not is_adamw:  # a group of which only some have a momentum cannot take a step
                    state[index] = {"momentum_buffer": torch.zeros_like(parameter)}
                if found or name not in trained:  # else it never had a gradient
                    anew.append(name)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    notes = [f"the moments of {_count(anew)} start anew"] if anew else []
    return notes + ([f"the moments of {_count(sorted(moments))}, not trained now, are dropped"] if moments else [])


def _restore_queues(training: Training, state: SavedState) -> list[str]:
    """Give each rank its own queue back, where ranks have queues of their own."""
    queues = state.tensors.get("rank_queues", {})
    if not queues or not _has_rank_queues(training):
        return []
    if state.values["world_size"] != world_size():
        return [f"every rank goes on with the queue of rank 0: there were {state.values['world_size']} ranks"]
    queue = training.method.get_submodule("queue")
    if any(queues[name].shape[1:] != value.shape for name, value in queue.state_dict().items()):
        return []  # said already: the queue starts anew
    queue.load_state_dict({name: values[rank()] for name, values in queues.items()})
    return []


def _has_rank_queues(training: Training) -> bool:
    return training.config.method.queue_scope == "rank" and hasattr(training.method, "queue")


def _queues_of_ranks(training: Training) -> dict[str, Tensor]:
    """Gather the queues where each rank has its own; nothing where they are alike."""
    if world_size() == 1 or not _has_rank_queues(training):
        return {}
    queues = {}
    for name, value in training.method.get_submodule("queue").state_dict().items():
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value)
        queues[name] = torch.stack(parts)
    return queues


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _count(names: list[str]) -> str:
    return f"{len(names)} parameters (first: {names[0]})"
