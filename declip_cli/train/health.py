"""How a run stands, what is wrong with it and what to do about it, in one sentence each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from declip_cli.resolve import ResolvedRun, settled

_STARVED_SHARE = 0.25
"""Share of the time spent waiting for data from which the loader is called the limit."""
_COLLAPSED_SPREAD = 0.02
"""Features this close to each other tell nothing apart; an untrained ViT has about 0.1."""
_TRUNCATED_SHARE = 0.1
_PATIENCE_REPORTS = 3
"""Reports after which what a loader and a model do counts."""
_CHANCE_MARGIN = 0.02
"""Share of ln(batch) within which a contrastive loss counts as chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """How a run stands after some step."""

    step: int
    total_steps: int
    samples_seen: int
    seconds: float
    """Since the run began, interruptions left out."""
    seconds_left: float
    step_seconds: float
    """Of `seconds`, those spent in steps."""
    samples_per_second: float
    """Since the last report, evaluations and savings left out."""
    wait_share: float
    """Share of that time spent waiting for data, in [0, 1]."""
    learning_rate: float
    logit_scale: float
    """Of the loss that is trained, exponentiated."""
    logit_bias: float | None = None
    """Of the sigmoid loss; None otherwise."""
    gradient_norm: float
    """Largest L2 norm before clipping since the last report; of broken batches none."""
    loss_scale: float | None
    """Of float16; None otherwise."""
    peak_memory_mib: float
    """Of this rank: of its GPU, or of the process."""
    num_bad_steps: int
    """Batches skipped since the run began because their gradient was NaN or infinite."""
    spread: dict[str, float]
    """Kind of feature → mean squared distance from the mean of this rank's last batch, in [0, 1]."""
    losses: dict[str, float]
    """Mean over ranks and over the good steps since the last report; `total` is the weighted sum."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Unreadable samples on this rank: cause → (number, first key)."""
    advice: tuple[str, ...] = ()
    """What looks wrong and what to do, each said once in a session."""
    is_last: bool = False
    was_stopped: bool = False
    """Whether somebody asked to stop before the end."""


def advice(
    report: StepReport, run: ResolvedRun, *, num_skipped: int, truncated_share: float
) -> Iterator[tuple[str, str]]:
    """Say what looks wrong and what to do.

    Args:
        report: how the run stands.
        run: what it is.
        num_skipped: broken batches since the report before.
        truncated_share: share of the texts that were longer than the context, in [0, 1].

    Yields:
        A name for each kind, so that each is said once, and the sentence.
    """
    model, machine, patience = run.config.model, run.machine, _PATIENCE_REPORTS * run.config.train.log_every_steps
    if num_skipped:
        words = f"{num_skipped} batches before step {report.step} had a broken gradient and were skipped"
        yield f"bad {report.step}", words
    if report.wait_share >= _STARVED_SHARE and report.step >= patience:
        can_grow = machine.workers < machine.cores
        side_px = round(settled(model.image_side_px) * 8 / 7)
        way = f"--set data.workers={machine.cores}" if can_grow else f"prepare with --image-side-px {side_px}"
        waiting = f"waiting for data {report.wait_share:.0%} of the time with {machine.workers} loader threads"
        yield "starved", f"{waiting}: {way}"
    if truncated_share > _TRUNCATED_SHARE:
        length = settled(model.context_length)
        way = "start with --set model.context_length=77" if length < 77 else "put what matters first"
        yield "cut", f"{truncated_share:.0%} of the captions are longer than the {length} tokens that are read: {way}"
    # While the rate warms up, what is wrong may resolve itself.
    if report.samples_seen > max(settled(run.config.optim.warmup_samples), patience * run.schedule_batch):
        yield from _collapse(report, run)


def _collapse(report: StepReport, run: ResolvedRun) -> Iterator[tuple[str, str]]:
    """Say when nothing is learned, or no more."""
    for kind, spread in report.spread.items():
        if spread < _COLLAPSED_SPREAD:
            yield (
                f"collapsed {kind}",
                f"{kind} features have collapsed (spread {spread:.3f} of 1): go back to an earlier state with a lower "
                "--learning-rate, a longer optim.warmup_steps or a larger --batch-size",
            )
    # The loss of a model that tells nothing apart, in nats; of the sigmoid at its best bias, but for 1 / batch.
    chance = math.log(run.global_batch) + (run.config.method.contrastive == "sigmoid")
    loss = next((report.losses[name] for name in ("clip", "filip") if name in report.losses), 0.0)
    if loss > (1 - _CHANCE_MARGIN) * chance and run.config.method.label_smoothing == 0:
        yield (
            "chance",
            f"the contrastive loss ({loss:.3f}) is that of guessing ({chance:.3f}): check "
            "that captions belong to their images, or lower --learning-rate",
        )
    if report.logit_scale >= 0.999 * math.exp(settled(run.config.train.logit_scale_max)):
        yield (
            "scale",
            f"the logit scale is at its bound ({report.logit_scale:.1f}): usual late in a long run; early, use a lower "
            "--learning-rate or a larger --batch-size",
        )


@torch.no_grad()
def spread(embeds: Tensor) -> Tensor:
    """Measure how far unit features lie from their mean: 0 where all are alike, near 1 where they point everywhere.

    Takes embeddings that are not normalized, (B, D), and returns 1 − ‖mean of unit features‖², ().
    """
    features = nn.functional.normalize(embeds.float(), dim=-1)
    return 1 - features.mean(0).square().sum()


def broken_weights(module: nn.Module) -> str:
    """Name the first weight or statistic that is NaN or infinite, if any; waits for the device."""
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    is_finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    return next((name for name, is_good in zip(state, is_finite, strict=True) if not is_good), "")
