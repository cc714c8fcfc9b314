"""The one loop: a batch, the objective, a step; it yields a report now and then and prints nothing."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from declip_cli.batch import LossTerms
from declip_cli.distributed import average_gradients, rank, world_size
from declip_cli.model.checkpoint import PretrainedModel, default_resize_px, save_model
from declip_cli.train.big_batch import forward_backward
from declip_cli.train.meter import Meter, StepReport
from declip_cli.train.optim import clamp_logit_scales, clip_gradients, learning_rate, set_learning_rates
from declip_cli.train.run_dir import RunDir
from declip_cli.train.setup import Training
from declip_cli.train.state import capture_state

Evaluate = Callable[[PretrainedModel], dict[str, dict[str, Any]]]
"""Scores a model on every evaluation set that was asked for: name → report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What comes next, the same on every rank."""

    is_done: bool
    """All steps are taken, or the time is up."""
    must_stop: bool
    """Somebody asked to stop."""
    must_save: bool
    schedule_step: int
    """Step of the schedule to take now; ahead of the step count where a time limit bites."""


def train(
    training: Training, run_dir: RunDir, *, evaluate: Evaluate | None, should_stop: Callable[[], bool]
) -> Iterator[StepReport]:
    """Train until the steps are done, the time is up or somebody asks to stop.

    Args:
        training: the parts; changed step by step.
        run_dir: where model and state go; only rank 0 writes.
        evaluate: scores the model in between and at the end, on rank 0; None leaves it out.
        should_stop: asked after every step.

    Yields:
        A report every `train.log_every_steps` steps, after evaluations, and a last one.

    Raises:
        TrainError: the loss is no number any more, or the disk is full.
        DataError: too many samples are unreadable.
    """
    config = training.config.train
    meter = Meter(training, run_dir=str(run_dir.path))
    _set_training_mode(training)
    clamp_logit_scales(training.method, training.bounds)
    last_save, rate = time.monotonic(), 0.0
    decision = _decide(training, seconds=meter.seconds(), wants_stop=False, seconds_since_save=0.0)
    while not (decision.is_done or decision.must_stop):
        rate = _scheduled_rate(training, decision.schedule_step)
        meter.add(_step(training, rate))
        decision = _decide(
            training,
            seconds=meter.seconds(),
            wants_stop=should_stop(),
            seconds_since_save=time.monotonic() - last_save,
        )
        if decision.is_done or decision.must_stop:
            break
        if decision.must_save:
            meter.losses()  # a state with a broken loss is not kept
            _save_state(training, run_dir, seconds=meter.seconds())
            last_save = time.monotonic()
        must_evaluate = config.eval_every_steps > 0 and training.step % config.eval_every_steps == 0
        scores = _scores(training, evaluate) if must_evaluate else {}
        if scores or training.step % config.log_every_steps == 0:
            share = (decision.schedule_step - 1) / training.total_steps
            yield meter.report(rate=rate, schedule_share=share, evaluations=scores)
    meter.losses()
    _save_state(training, run_dir, seconds=meter.seconds())
    _save_model(training, run_dir)
    scores = _scores(training, evaluate) if decision.is_done else {}
    share, stopped = min(1.0, (decision.schedule_step - 1) / training.total_steps), not decision.is_done
    yield meter.report(rate=rate, schedule_share=share, evaluations=scores, is_last=True, was_stopped=stopped)


def _step(training: Training, rate: float) -> LossTerms:
    accelerator, method = training.accelerator, training.method
    scaler = accelerator.scaler  # of float16; None otherwise
    batch = next(training.stream).to(accelerator.device)
    result = forward_backward(
        method,
        batch,
        micro_batch_size=training.config.train.micro_batch_size,
        autocast=accelerator.autocast,
        scale_loss=scaler.scale if scaler is not None else lambda loss: loss,
    )
    average_gradients(method.parameters())
    set_learning_rates(training.optimizers, rate)
    for optimizer in training.optimizers:
        if scaler is not None:
            scaler.unscale_(optimizer)
    if training.config.optim.gradient_clip_norm > 0:
        clip_gradients(method.parameters(), training.config.optim.gradient_clip_norm)
    for optimizer in training.optimizers:
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    clamp_logit_scales(method, training.bounds)
    method.remember(result.embeddings)
    if training.average is not None:
        training.average.update(method.encoder)
    training.step += 1
    training.samples_seen += len(batch) * world_size()
    return result.terms


def _decide(training: Training, *, seconds: float, wants_stop: bool, seconds_since_save: float) -> _Decision:
    config = training.config.train
    step = training.step + 1
    if config.time_limit_s > 0:  # on a slow machine the schedule runs by the clock
        step = max(step, 1 + math.floor(seconds / config.time_limit_s * training.total_steps))
    is_due = config.checkpoint_every_steps > 0 and training.step % config.checkpoint_every_steps == 0
    is_due |= 0 < config.checkpoint_every_minutes * 60 <= seconds_since_save
    flags = torch.tensor([wants_stop, is_due, step], dtype=torch.int64)
    if world_size() > 1:
        flags = flags.to(training.accelerator.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    stop, save, step = (int(flag) for flag in flags)
    return _Decision(
        is_done=step > training.total_steps, must_stop=bool(stop), must_save=bool(save), schedule_step=step
    )


def _scheduled_rate(training: Training, step: int) -> float:
    optim = training.config.optim
    return learning_rate(
        step,
        start=optim.learning_rate_start if optim.learning_rate_start >= 0 else optim.learning_rate_peak / 10,
        peak=optim.learning_rate_peak,
        end=optim.learning_rate_end,
        warmup_steps=training.warmup_steps,
        total_steps=training.total_steps,
    )


def _set_training_mode(training: Training) -> None:
    training.method.train()
    for name in training.config.train.freeze:  # a frozen tower's BatchNorm stays as it is
        tower = training.method.encoder.visual if name == "image" else training.method.encoder.text
        tower.eval()


def _save_state(training: Training, run_dir: RunDir, *, seconds: float) -> None:
    training.seconds = seconds
    state = capture_state(training)
    if rank() == 0:
        run_dir.save_state(state)


def _save_model(training: Training, run_dir: RunDir) -> None:
    if rank() == 0:
        encoder = training.method.encoder
        if training.average is not None:
            encoder = training.average.averaged(encoder)
        save_model(encoder, run_dir.model_path, config=training.config.model, method=training.config.method.name)


def _scores(training: Training, evaluate: Evaluate | None) -> dict[str, dict[str, Any]]:
    """Score the model as it is now, on rank 0 while the others wait."""
    if evaluate is None:
        return {}
    scores: dict[str, dict[str, Any]] = {}
    if rank() == 0:
        encoder = training.method.encoder
        if training.average is not None:
            encoder = training.average.averaged(encoder)
        architecture = encoder.architecture
        model = PretrainedModel(
            encoder=encoder.eval(),
            name="(in training)",
            method=training.config.method.name,
            arch=training.config.model.arch,
            token_wise=training.config.method.name == "filip",
            image_side_px=architecture.image_side_px,
            resize_px=default_resize_px(architecture.image_side_px),
            context_length=architecture.text.context_length,
            fingerprint="",
        )
        scores = evaluate(model)
        _set_training_mode(training)
    training.accelerator.wait_for_everyone()
    return scores
