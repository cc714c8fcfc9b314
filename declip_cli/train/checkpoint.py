"""Save states, models and scores by name, restore what fits, and roll back to a good state."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from declip_cli.config_files import flatten
from declip_cli.distributed import copy_from_main, rank, world_size
from declip_cli.errors import TrainError
from declip_cli.model.checkpoint import PretrainedModel, save_model, trained_preprocessing
from declip_cli.model.clip import DualEncoder
from declip_cli.process_group import from_all
from declip_cli.train.build import Training
from declip_cli.train.health import broken_weights
from declip_cli.train.meter import Meter
from declip_cli.train.run_dir import RunDir, SavedState

Evaluate = Callable[[PretrainedModel], dict[str, dict[str, Any]]]
"""Scores a model on every evaluation set that was asked for: name → report; called on every rank."""
_COUNTERS = ("samples_seen", "seconds", "startup_seconds", "step_seconds", "num_rollbacks")


class Checkpointer:
    """Saves, evaluates and rolls back, on every rank alike; only rank 0 writes. The meter is notified."""

    def __init__(self, training: Training, run_dir: RunDir, meter: Meter, evaluate: Evaluate | None) -> None:
        self._training, self._run_dir, self._meter, self._evaluate = training, run_dir, meter, evaluate
        self._last_save = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time to save."""
        minutes = self._training.config.train.checkpoint_every_minutes
        return bool(minutes) and time.monotonic() - self._last_save >= 60 * (minutes or 0)

    def problem(self) -> str:
        """Say which weight is NaN or infinite, on any rank; such a state is not worth keeping."""
        name = next((name for name in from_all(broken_weights(self._training.method)) if name), "")
        return f"a weight is NaN or infinite after step {self._training.step} ({name})" if name else ""

    def save(self) -> None:
        """Write the state, and the model as it is now, on rank 0."""
        training = self._training
        with self._meter.paused():
            training.seconds = self._meter.seconds()
            state = capture_state(training)
            if rank() == 0:
                self._run_dir.save_state(state, training.run, keep=training.config.train.keep_states)
                self._save_model(self._run_dir.model_path)
        self._last_save = time.monotonic()

    def _save_model(self, path: Path) -> None:
        config = self._training.config
        save_model(self._encoder(), path, config=config.model, method=config.method.name)

    def _encoder(self) -> DualEncoder:
        training = self._training
        encoder = training.method.encoder
        return encoder if training.average is None else training.average.averaged(encoder)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Score the model as it is now, on all ranks together; keep it if it is the best."""
        if self._evaluate is None:
            return {}
        training = self._training
        with self._meter.paused(), training.compilation.left_out():
            encoder, config = self._encoder(), training.config
            if world_size() > 1 and config.method.batch_norm == "rank":
                # Ranks have statistics of their own; all score the model that rank 0 saves.
                encoder = copy.deepcopy(encoder)
                copy_from_main(encoder.buffers())
            model = PretrainedModel(
                encoder=encoder.eval(),
                name="(in training)",
                method=config.method.name,
                arch=config.model.arch,
                token_wise=config.method.name == "filip",
                preprocessing=trained_preprocessing(encoder, config.model),
                context_length=encoder.architecture.text.context_length,
                fingerprint="",
            )
            scores = self._evaluate(model)
            set_training_mode(training)
            if config.train.keep_best and rank() == 0:
                self._keep_best(config.train.keep_best, flatten(scores))
        return scores

    def _keep_best(self, key: str, scores: dict[str, Any]) -> None:
        best = self._run_dir.read_best(key)
        if best is None or scores[key] > best:
            self._save_model(self._run_dir.best_path)
            self._run_dir.write_best(key=key, score=scores[key], step=self._training.step)

    def roll_back(self, problem: str) -> None:
        """Return to the last good state, at half the learning rate.

        Raises:
            TrainError: there is none, or it was tried often enough.
        """
        training, path = self._training, self._run_dir.path
        num, allowed = training.num_rollbacks + 1, training.config.train.max_rollbacks
        if num > allowed or not self._run_dir.has_state():
            tried = f"; going back to a good state {allowed} times did not help" if num > allowed else ""
            raise TrainError(
                f"{problem}{tried}",
                remedy=f"resume from the last good state: declip pretrain --resume {path} --learning-rate "
                f"{training.schedule.peak / 2 ** (num + 1):.1e}, or start again with that",
            )
        state = load_same_state(self._run_dir)
        restore_state(training, state)
        training.num_rollbacks = num
        if rank() == 0:
            self._run_dir.forget_metrics_after(training.step)
            self._run_dir.log(f"{problem}: back to step {training.step}, at 1/{2**num} of the rate")
        self._meter.forget()


def load_same_state(run_dir: RunDir) -> SavedState:
    """Read the newest state that every rank can read.

    Raises:
        TrainError: there is none.
    """
    state = run_dir.load_state()
    step = min(from_all(state.step))
    return state if step == state.step else run_dir.load_state(before=step + 1)


def set_training_mode(training: Training) -> None:
    """Put all into training mode but for frozen towers, whose BatchNorm stays as it is."""
    training.method.train()
    for name in training.config.train.freeze:
        tower = training.method.encoder.visual if name == "image" else training.method.encoder.text
        tower.eval()


def capture_state(training: Training) -> SavedState:
    """Collect the state of a run for rank 0 to write; call it on every rank."""
    tensors = {
        "method": dict(training.method.state_dict()),
        "optimizer": _optimizer_tensors(training),
        "random": {"cpu": torch.get_rng_state()},
        "rank_queues": _queues_of_ranks(training),
    }
    if training.accelerator.device.type == "cuda":
        tensors["random"]["cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {
        **{name: getattr(training, name) for name in _COUNTERS},
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
    """Restore a saved state; the next step is the one that would have come.

    Weights and moments are matched by name and shape. What a changed method or option adds is newly initialized.

    Returns:
        What was reinitialized or dropped, a sentence each; nothing where the settings are the same.

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
    training.step = state.step
    for name in _COUNTERS:
        setattr(training, name, values[name])
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
    # A head or a queue of which one part does not fit is reinitialized as a whole.
    restarted = {_module_of(name) for name in unfit}
    fitting = {name: saved[name] for name in own if _module_of(name) not in restarted}
    training.method.load_state_dict(own | fitting)
    gone = {_module_of(name) for name in saved} - {_module_of(name) for name in own}
    notes = (
        [f"{', '.join(sorted(restarted))} of the method is reinitialized: the saved state has none that fits"]
        if restarted
        else []
    )
    return notes + ([f"{', '.join(sorted(gone))} of the saved state is not used by this method"] if gone else [])


def _module_of(name: str) -> str:
    """Name the part of a method that a tensor belongs to: its encoder, its token-wise heads, a head, its queue."""
    return "encoder.token_wise" if name.startswith("encoder.token_wise.") else name.split(".")[0]


def _names_of(training: Training) -> dict[int, str]:
    return {id(parameter): name for name, parameter in training.method.named_parameters()}


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    """Flatten the state of the optimizers: `encoder.visual.proj.exp_avg` and so on."""
    names = _names_of(training)
    return {
        f"{names[id(parameter)]}.{key}": value
        for optimizer in training.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _trained_names(training: Training) -> list[str]:
    names, groups = _names_of(training), [group for one in training.optimizers for group in one.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _restore_optimizers(training: Training, saved: dict[str, Tensor], trained: list[str]) -> list[str]:
    names = _names_of(training)
    moments: dict[str, dict[str, Tensor]] = {}
    for dotted, value in saved.items():
        name, _, key = dotted.rpartition(".")
        moments.setdefault(name, {})[key] = value
    restarted: list[str] = []
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
                    restarted.append(name)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    notes = [f"the moments of {_count(restarted)} are reinitialized"] if restarted else []
    return notes + ([f"the moments of {_count(sorted(moments))}, not trained now, are dropped"] if moments else [])


def _rank_queue(training: Training) -> nn.Module | None:
    """Return the queue where each rank has its own."""
    has_own = training.config.method.queue_scope == "rank" and hasattr(training.method, "queue")
    return training.method.get_submodule("queue") if has_own else None


def _restore_queues(training: Training, state: SavedState) -> list[str]:
    queues, queue = state.tensors.get("rank_queues", {}), _rank_queue(training)
    if not queues or queue is None:
        return []
    if state.values["world_size"] != world_size():
        return [f"every rank continues with the queue of rank 0: there were {state.values['world_size']} ranks"]
    if any(queues[name].shape[1:] != value.shape for name, value in queue.state_dict().items()):
        return []  # reported already: the queue is reinitialized
    queue.load_state_dict({name: values[rank()] for name, values in queues.items()})
    return []


def _queues_of_ranks(training: Training) -> dict[str, Tensor]:
    """Gather the queues where each rank has its own; nothing where they are alike."""
    queue = _rank_queue(training)
    if world_size() == 1 or queue is None:
        return {}
    queues = {}
    for name, value in queue.state_dict().items():
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value)
        queues[name] = torch.stack(parts)
    return queues


def _count(names: list[str]) -> str:
    return f"{len(names)} parameters (first: {names[0]})"
