"""Which parameters learn how fast: groups, schedule, bounds of the logit scales."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from declip_cli.config import OptimConfig, RunConfig
from declip_cli.config_checks import require
from declip_cli.model.batch_norm import FullBatchNorm

_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, FullBatchNorm)


def learning_rate(step: int, *, start: float, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Compute the rate of one step: linear up to the peak, then half a cosine.

    Args:
        step: from 1 to `total_steps`.
        start: rate of step 1.
        peak: rate of step `warmup_steps`.
        end: rate of step `total_steps`.
        warmup_steps: 0 or 1 starts at the peak.
        total_steps: length of the run.

    Returns:
        The learning rate.

    Source: the original's Cosine scheduler; values in its YFCC15M recipe: step 1 1e-4, 1,250 5.498e-4, 2,500 1e-3.
    """
    if step <= warmup_steps and warmup_steps > 1:
        return start + (peak - start) * (step - 1) / (warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_length(config: OptimConfig, total_steps: int) -> int:
    """Settle the length of the warm-up.

    Args:
        config: `warmup_steps`, where -1 leaves the choice.
        total_steps: length of the run.

    Returns:
        Steps of warm-up.

    Raises:
        ConfigError: an explicit length does not fit into the run.
    """
    if config.warmup_steps < 0:
        return min(2500, total_steps // 10)
    require(
        config.warmup_steps < total_steps or total_steps <= 1,
        f"optim.warmup_steps must be less than the steps of the run (got {config.warmup_steps}, {total_steps})",
        remedy=f"--set optim.warmup_steps={total_steps // 10}",
    )
    return config.warmup_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What distinguishes one parameter group from another."""

    optimizer: str
    weight_decay: float
    peak: float
    """Learning rate at the peak."""


def build_optimizers(method: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Make the optimizers: one, or one for each tower.

    Each group carries `factor`, what the schedule is multiplied by.

    Args:
        method: the module to train; frozen parameters are left out.
        config: the run.

    Returns:
        AdamW (fused) and SGD with Nesterov momentum, as far as parameters use them.
    """
    optim = config.optim
    plain = _undecayed(method, is_faithful=config.method.faithful)
    groups: dict[_Group, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            group = _group_of(name, optim, has_decay=name not in plain, factor=layer_factor(name, method, optim))
            if group.peak > 0:
                groups.setdefault(group, []).append(parameter)
    built: list[torch.optim.Optimizer] = []
    for kind in sorted({group.optimizer for group in groups}):
        options = [
            {
                "params": parameters,
                "weight_decay": group.weight_decay,
                "factor": group.peak / optim.learning_rate_peak,
                "lr": group.peak,
            }
            for group, parameters in groups.items()
            if group.optimizer == kind
        ]
        if kind == "adamw":
            betas = (optim.beta1, optim.beta2)
            built.append(torch.optim.AdamW(options, lr=1.0, betas=betas, eps=optim.epsilon, fused=True))
        else:
            built.append(torch.optim.SGD(options, lr=1.0, momentum=optim.momentum, nesterov=optim.momentum > 0))
    return built


def _group_of(name: str, optim: OptimConfig, *, has_decay: bool, factor: float) -> _Group:
    kind, peak, decay = optim.optimizer, optim.learning_rate_peak, optim.weight_decay
    if name.startswith("encoder.text."):
        kind = optim.text_optimizer or kind
        peak = optim.text_learning_rate_peak or peak
        decay = optim.text_weight_decay if optim.text_weight_decay >= 0 else decay
    if "logit_scale" in name and optim.logit_scale_learning_rate >= 0:
        peak = optim.logit_scale_learning_rate
    return _Group(optimizer=kind, weight_decay=decay if has_decay else 0.0, peak=peak * factor)


def _undecayed(method: nn.Module, *, is_faithful: bool) -> set[str]:
    """Name the parameters without weight decay.

    As the original really acts: biases of linear, convolution and norm modules, weights of norms, logit scales; its
    attention biases and class embedding are decayed. By default: everything with less than two dimensions.
    """
    if not is_faithful:
        return {name for name, parameter in method.named_parameters() if parameter.dim() < 2}
    names = {name for name, _ in method.named_parameters() if "logit_scale" in name}
    for path, module in method.named_modules():
        if isinstance(module, _NORMS):
            names |= {f"{path}.weight", f"{path}.bias"}
        elif isinstance(module, nn.Linear | nn.Conv2d):
            names.add(f"{path}.bias")
    return names


def layer_factor(name: str, method: nn.Module, optim: OptimConfig) -> float:
    """Compute the factor that layer-wise decay puts on a parameter's learning rate.

    Args:
        name: such as `encoder.visual.transformer.resblocks.3.ln_1.weight`.
        method: to count the layers of its towers.
        optim: `layer_decay`.

    Returns:
        1 for heads and the last layers, `layer_decay` per layer below.
    """
    tower = re.match(r"encoder\.(visual|text)\.", name)
    if tower is None or optim.layer_decay == 1.0:
        return 1.0
    pattern = re.compile(re.escape(tower.group(0)) + r"(?:transformer\.resblocks\.|layer)(\d+)\.")
    found = [int(match.group(1)) for key, _ in method.named_parameters() if (match := pattern.match(key))]
    last = max(found)
    own = pattern.match(name)
    if own is not None:
        return optim.layer_decay ** (last + 1 - int(own.group(1)))
    is_top = re.search(r"\.(ln_post|proj|ln_final|text_projection|attnpool)\b", name) is not None
    return 1.0 if is_top else optim.layer_decay ** (last + 2 - min(found))


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group its share of the schedule's rate.

    Args:
        optimizers: changed in place.
        rate: the schedule's.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]


def logit_scale_bounds(config: RunConfig) -> tuple[float, float]:
    """Return the bounds of the logarithm of the logit scales: [ln 1, ln 100], in the faithful mode [3, 6].

    Source: the original's `grad_clip: logit_scale_param_value` of its recipes; OpenCLIP and SLIP for the default.
    """
    low, high = (3.0, 6.0) if config.method.faithful else (0.0, math.log(100.0))
    low = config.train.logit_scale_min if config.train.logit_scale_min >= 0 else low
    high = config.train.logit_scale_max if config.train.logit_scale_max >= 0 else high
    require(
        low <= high,
        f"train.logit_scale_min must not exceed train.logit_scale_max (got {low}, {high})",
        remedy="--set train.logit_scale_max=4.6052",
    )
    return low, high


@torch.no_grad()
def clamp_logit_scales(method: nn.Module, bounds: tuple[float, float]) -> None:
    """Push every logit scale back into its bounds.

    Args:
        method: changed in place.
        bounds: lowest and highest logarithm.
    """
    for name, parameter in method.named_parameters():
        if "logit_scale" in name:
            parameter.clamp_(*bounds)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm stays below a bound.

    Args:
        parameters: those with gradients are counted.
        max_norm: 0 only measures.

    Returns:
        The norm before clipping, ().
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf, foreach=True)
