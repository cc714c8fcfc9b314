"""What is wrong with a run and what to do about it, in one sentence each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STARVED_SHARE = 0.25
"""Share of the time spent waiting for data from which the loader is called the limit."""
_COLLAPSED_SPREAD = 0.02
"""Features this close to each other tell nothing apart; an untrained ViT has about 0.1."""
_CHANCE_MARGIN = 0.02
"""Share of ln(batch) within which a contrastive loss counts as chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What a run is judged by at a report."""

    step: int
    is_warm: bool
    """The warm-up is over: what is wrong now does not mend itself."""
    wait_share: float
    contrastive_loss: float | None
    chance_loss: float
    """ln of the global batch: what a model that tells nothing apart has."""
    spread: dict[str, float]
    """Kind of feature → mean squared distance of unit features from their mean, in [0, 1]."""
    logit_scale: float
    logit_scale_max: float
    num_bad_steps: int
    """Since the last report."""
    context_length: int
    num_cut_captions: int
    num_texts: int


def advice(vitals: Vitals, *, workers: int, cores: int, side_px: int) -> Iterator[tuple[str, str]]:
    """Say what looks wrong and what to do.

    Args:
        vitals: how the run does.
        workers: loader threads of this process.
        cores: cores of this process.
        side_px: side of the views, in pixels.

    Yields:
        A name for each kind, so that each is said once, and the sentence.
    """
    if vitals.num_bad_steps:
        yield (
            f"bad {vitals.step}",
            f"{vitals.num_bad_steps} batches before step {vitals.step} had a broken gradient and were skipped",
        )
    if vitals.wait_share >= STARVED_SHARE:
        way = (
            f"--set data.workers={cores}"
            if workers < cores
            else f"prepare with --image-side-px {round(side_px * 8 / 7)}"
        )
        yield "starved", f"waiting for data {vitals.wait_share:.0%} of the time with {workers} loader threads: {way}"
    if vitals.num_texts and vitals.num_cut_captions > 0.1 * vitals.num_texts:
        share = vitals.num_cut_captions / vitals.num_texts
        way = "start with --set model.context_length=77" if vitals.context_length < 77 else "put what matters first"
        yield (
            "cut",
            f"{share:.0%} of the captions are longer than the {vitals.context_length} tokens that are read: {way}",
        )
    if not vitals.is_warm:
        return
    yield from _collapse(vitals)


def _collapse(vitals: Vitals) -> Iterator[tuple[str, str]]:
    """Say when nothing is learned, or no more."""
    for kind, spread in vitals.spread.items():
        if spread < _COLLAPSED_SPREAD:
            yield (
                f"collapsed {kind}",
                f"{kind} features have collapsed (spread {spread:.3f} of 1): go back to an earlier state with a lower "
                "--learning-rate, a longer optim.warmup_steps or a larger --batch-size",
            )
    loss = vitals.contrastive_loss
    if loss is not None and loss > (1 - _CHANCE_MARGIN) * vitals.chance_loss:
        yield (
            "chance",
            f"the contrastive loss ({loss:.3f}) is that of guessing (ln of the batch, {vitals.chance_loss:.3f}): check "
            "that captions belong to their images, or lower --learning-rate",
        )
    if vitals.logit_scale >= 0.999 * vitals.logit_scale_max:
        yield (
            "scale",
            f"the logit scale is at its bound ({vitals.logit_scale:.1f}): usual late in a long run; early, use a lower "
            "--learning-rate or a larger --batch-size",
        )


@torch.no_grad()
def spread(embeds: Tensor) -> Tensor:
    """Measure how far unit features lie from their mean: 0 where all are alike, near 1 where they point everywhere.

    Args:
        embeds: not normalised, (B, D).

    Returns:
        1 − ‖mean of unit features‖², ().
    """
    features = nn.functional.normalize(embeds.float(), dim=-1)
    return 1 - features.mean(0).square().sum()


def broken_weights(module: nn.Module) -> str:
    """Name the first weight or statistic that is NaN or infinite; waits for the device.

    Args:
        module: parameters and buffers are looked at.

    Returns:
        Its name; empty if all are numbers.
    """
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    is_finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    return next((name for name, is_good in zip(state, is_finite, strict=True) if not is_good), "")


def chance_loss(global_batch: int) -> float:
    """Return the contrastive loss of a model that tells nothing apart, in nats."""
    return math.log(global_batch)
