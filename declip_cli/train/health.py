"""What is wrong with a run and what to do about it, in one sentence each."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from declip_cli.errors import TrainError

STARVED_SHARE = 0.25
"""Share of the time spent waiting for data from which the loader is called the limit."""


def check_finite(losses: Mapping[str, float], *, step: int, run_dir: str) -> None:
    """Stop a run whose loss is no number any more, before it is saved.

    Args:
        losses: term → value.
        step: where it was seen.
        run_dir: where the last good state lies.

    Raises:
        TrainError: a term is infinite or not a number.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise _diverged(f"the loss is no longer a number at step {step} ({', '.join(bad)})", run_dir)


def check_finite_weights(module: nn.Module, *, step: int, run_dir: str) -> None:
    """Stop a run whose last step broke the weights, before they replace the last good state.

    The loss of a step is computed before its update: it can be finite where the weights no longer are.

    Args:
        module: parameters and buffers are looked at.
        step: the step just taken.
        run_dir: where the last good state lies.

    Raises:
        TrainError: a value is infinite or not a number.
    """
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    is_finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    bad = [name for name, is_good in zip(state, is_finite, strict=True) if not is_good]
    if bad:
        raise _diverged(f"{len(bad)} weights are no longer numbers after step {step} (first: {bad[0]})", run_dir)


def _diverged(message: str, run_dir: str) -> TrainError:
    return TrainError(
        message,
        remedy=f"go on from the last good state with a lower rate: declip pretrain --resume {run_dir} "
        "--set optim.learning_rate_peak=… or --set optim.gradient_clip_norm=1",
    )


def starved_loader_advice(wait_share: float, *, workers: int, cores: int, side_px: int) -> str:
    """Say what to do when the loader is the limit.

    Args:
        wait_share: share of the time spent waiting for data, in [0, 1].
        workers: loader threads in use.
        cores: cores there are.
        side_px: side of the views, in pixels.

    Returns:
        One sentence; empty when the loader keeps up.
    """
    if wait_share < STARVED_SHARE:
        return ""
    advice = (
        f"--set data.workers={cores}" if workers < cores else f"prepare with --image-side-px {round(side_px * 8 / 7)}"
    )
    return f"waiting for data {wait_share:.0%} of the time: {advice}"
