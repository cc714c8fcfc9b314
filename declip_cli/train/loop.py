"""The one loop: a batch, the objective, a step; it yields a report now and then and prints nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from declip_cli.distributed import LaggedMaximum, world_size
from declip_cli.resolve import settled
from declip_cli.train.build import Training
from declip_cli.train.checkpoint import Checkpointer, Evaluate, set_training_mode
from declip_cli.train.grad_cache import forward_backward
from declip_cli.train.health import StepReport
from declip_cli.train.meter import Meter, StepOutcome
from declip_cli.train.optim import clamp_logit_scales, clip_gradients, set_learning_rates, step_where
from declip_cli.train.run_dir import RunDir

_SHARE_UNITS = 10**9
"""Ranks agree on whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What comes next, the same on every rank."""

    is_done: bool
    """All pairs are seen, or the time is up."""
    must_stop: bool
    """Somebody asked to stop."""
    must_save: bool
    learning_rate: float
    """Learning rate of the next step."""
    share: float
    """How much of the run is over, in [0, 1]."""

    @property
    def is_over(self) -> bool:
        """Whether no further step is taken now."""
        return self.is_done or self.must_stop


def take_step(training: Training, learning_rate: float) -> StepOutcome:
    """Take one step: batch, gradient of the full batch, update.

    A gradient that is not finite leaves weights, moments, statistics and queue as they are. The device decides that
    by itself, so nothing here waits for it.
    """
    accelerator, method = training.accelerator, training.method
    scaler = accelerator.scaler  # of float16; None otherwise
    batch = next(training.batches)
    method.before_step(training.samples_seen / settled(training.config.train.samples))
    statistics = [value for name, value in method.named_buffers() if name.endswith(("running_mean", "running_var"))]
    before = [value.clone() for value in statistics]
    result = forward_backward(
        method,
        batch,
        micro_batch_size=training.config.train.micro_batch_size or 0,
        autocast=accelerator.autocast,
        scale_loss=scaler.scale if scaler is not None else lambda loss: loss,
        last_backward=training.gradient_average.last_backward,
    )
    set_learning_rates(training.optimizers, learning_rate)
    for optimizer in training.optimizers if scaler is not None else ():
        scaler.unscale_(optimizer)
    norm = clip_gradients(method.parameters(), training.clip_norm)
    is_good = norm.isfinite()
    step_where(training.optimizers, is_good)
    if scaler is not None:
        scaler.update()  # from what unscale_ found
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=True)
    for value, old in zip(statistics, before, strict=True):
        value.copy_(torch.where(is_good, value, old))
    clamp_logit_scales(method, training.logit_scale_bounds)
    method.update_queue(result.embeddings, is_good)
    if training.average is not None:
        training.average.update(method.encoder)
    training.step += 1
    training.samples_seen += len(batch) * world_size()
    is_bad = ~is_good
    if scaler is not None:  # a gradient may overflow until the scale has found its place
        is_bad &= ~result.terms.total.isfinite() | (scaler.scale(torch.ones_like(norm)) < 1)
    return StepOutcome(
        terms=result.terms, embeddings=result.embeddings, gradient_norm=norm, is_good=is_good, is_bad=is_bad
    )


def train(
    training: Training, run_dir: RunDir, *, evaluate: Evaluate | None, should_stop: Callable[[], bool]
) -> Iterator[StepReport]:
    """Train until all pairs are seen, the time is up or somebody asks to stop.

    Args:
        training: the parts; changed step by step.
        run_dir: where model and state go; only rank 0 writes.
        evaluate: scores the model in between and at the end; None leaves it out.
        should_stop: asked after every step.

    Yields:
        A report every `train.log_every_steps` steps, after evaluations, and a last one.

    Raises:
        TrainError: the loss stays broken, or the disk is full.
        DataError: too many samples are unreadable.
    """
    meter = Meter(training)
    checkpointer = Checkpointer(training, run_dir, meter, evaluate)
    agreed = LaggedMaximum()
    set_training_mode(training)
    clamp_logit_scales(training.method, training.logit_scale_bounds)
    decision, learning_rate = _decide(training, meter, checkpointer, agreed, wants_stop=False), 0.0
    while not decision.is_over:
        learning_rate = decision.learning_rate
        meter.add(take_step(training, learning_rate))
        decision = _decide(training, meter, checkpointer, agreed, wants_stop=should_stop())
        must_evaluate, must_report = (_is_due(training, key) for key in ("eval_every_steps", "log_every_steps"))
        if not (decision.is_over or decision.must_save or must_evaluate or must_report):
            training.batches.copy_ahead()  # nothing is saved before it is used
            continue
        problem = meter.problem() or (checkpointer.problem() if decision.is_over or decision.must_save else "")
        if problem:
            checkpointer.roll_back(problem)
            decision = _decide(training, meter, checkpointer, agreed, wants_stop=should_stop())
        elif not decision.is_over:
            if decision.must_save or must_evaluate:  # a scheduler may end the run while it is scored
                checkpointer.save()
                agreed.restart()
            scores = checkpointer.scores() if must_evaluate else {}
            if scores or must_report:
                report = meter.report(learning_rate=learning_rate, share=decision.share, evaluations=scores)
                yield training.compilation.decide(report)
    checkpointer.save()
    scores = checkpointer.scores() if decision.is_done else {}
    share = max(decision.share, 1e-9)
    report = meter.report(learning_rate=learning_rate, share=share, evaluations=scores)
    yield replace(report, is_last=True, was_stopped=not decision.is_done)


def _is_due(training: Training, key: str) -> bool:
    every = getattr(training.config.train, key)
    return every is not None and training.step > 0 and training.step % every == 0


def _decide(
    training: Training, meter: Meter, checkpointer: Checkpointer, agreed: LaggedMaximum, *, wants_stop: bool
) -> _Decision:
    """Agree on what comes next: the rank that was furthest a step ago decides, so that none waits for a message."""
    limit, started = training.config.train.time_limit_s, training.startup_seconds
    spent = (meter.seconds() - started) / max(1e-9, limit - started) if limit else 0.0
    stop, save, units = agreed.exchange([wants_stop, checkpointer.is_due(), round(min(1.0, spent) * _SHARE_UNITS)])
    must_save = bool(save) or _is_due(training, "checkpoint_every_steps")
    schedule, seen, time_share = training.schedule, training.samples_seen, units / _SHARE_UNITS
    share = schedule.share(seen, time_share)
    learning_rate = schedule.learning_rate(seen + training.run.global_batch, time_share) * 0.5**training.num_rollbacks
    return _Decision(
        is_done=share >= 1, must_stop=bool(stop), must_save=must_save, learning_rate=learning_rate, share=share
    )
