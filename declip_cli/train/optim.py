"""Which parameters learn how fast: groups, schedule, bounds of the logit scales; and their running average."""

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from declip_cli.config import OptimConfig, RunConfig
from declip_cli.model.batch_norm import FullBatchNorm
from declip_cli.model.clip import DualEncoder
from declip_cli.resolve import ResolvedRun, settled

_WARMUP_SHARE_OF_TIME = 0.1
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, FullBatchNorm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate by pairs seen: linear up to the peak, then half a cosine.

    Counted in pairs, so that another batch or another number of processes changes nothing. With a time limit, pairs
    or time decide, whichever is nearer to its end.

    Source: the original's Cosine scheduler; values in its YFCC15M recipe: step 1 1e-4, 1,250 5.498e-4, 2,500 1e-3.
    """

    start: float
    """Rate of the first step."""
    peak: float
    end: float
    first: int
    """Pairs seen with the first step; its rate is `start`."""
    warmup: int
    """Pairs seen with the step whose rate is the peak."""
    total: int
    """Pairs seen with the last step."""
    is_warmup_asked: bool = False
    """The warm-up was asked for in steps or pairs: it is run in full. Else a tenth of the time ends it, too."""

    def share(self, samples: int, time_share: float = 0.0) -> float:
        """Return how much of the run is over, in [0, 1].

        Args:
            samples: pairs seen.
            time_share: how much of the time limit is spent, starting up left out; 0 without a limit.
        """
        return min(1.0, max(samples / self.total, time_share))

    def learning_rate(self, samples: int, time_share: float = 0.0) -> float:
        """Compute the rate of the step that makes the pairs seen as many as `samples`.

        Args:
            samples: pairs seen with that step.
            time_share: as in `share`, before that step.
        """
        cap = 1.0 if self.is_warmup_asked else _WARMUP_SHARE_OF_TIME
        if self.warmup > self.first and samples < self.warmup and time_share < cap:
            risen = (samples - self.first) / (self.warmup - self.first)
            if not self.is_warmup_asked:
                risen = max(risen, time_share / cap)
            return self.start + (self.peak - self.start) * max(0.0, risen)
        fallen = (samples - self.warmup) / max(1, self.total - self.warmup)
        # The share of the time that the warm-up has taken, at the speed so far.
        warm = min(cap, time_share * self.warmup / max(samples, self.first))
        if time_share > warm:
            fallen = max(fallen, (time_share - warm) / max(1e-9, 1 - warm))
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * min(1.0, max(0.0, fallen)))) / 2


def schedule_of(run: ResolvedRun) -> Schedule:
    """Lay out the learning rate of a run."""
    optim = run.config.optim
    return Schedule(
        start=settled(optim.learning_rate_start),
        peak=settled(optim.learning_rate_peak),
        end=optim.learning_rate_end,
        first=run.schedule_batch,
        warmup=settled(optim.warmup_samples),
        total=settled(run.config.train.samples),
        is_warmup_asked=settled(optim.warmup_in_full),
    )


class _Group(NamedTuple):
    """What distinguishes one parameter group from another."""

    optimizer: str
    weight_decay: float
    peak: float
    """Learning rate at the peak."""


def build_optimizers(method: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Make the optimizers: one, or one for each tower; frozen parameters are left out.

    Each group carries `factor`, what the schedule is multiplied by.

    Returns:
        AdamW and SGD with Nesterov momentum, as far as parameters use them; both fused, which lets a step be skipped
        without asking the device (`step_where`).
    """
    optim = config.optim
    peak = settled(optim.learning_rate_peak)
    plain = _undecayed(method, decayed=optim.decayed)
    groups: dict[_Group, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            group = _group_of(name, optim, has_decay=name not in plain, factor=layer_factor(name, method, optim))
            if group.peak > 0:
                groups.setdefault(group, []).append(parameter)
    built: list[torch.optim.Optimizer] = []
    for kind in sorted({group.optimizer for group in groups}):
        options = [
            {"params": members, "weight_decay": group.weight_decay, "factor": group.peak / peak, "lr": group.peak}
            for group, members in groups.items()
            if group.optimizer == kind
        ]
        if kind == "adamw":
            betas = (optim.beta1, optim.beta2)
            built.append(torch.optim.AdamW(options, lr=1.0, betas=betas, eps=optim.epsilon, fused=True))
        else:
            sgd = torch.optim.SGD(options, lr=1.0, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=True)
            # The momentum of a first step that is skipped would be left without a value.
            for parameter in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            built.append(sgd)
    return built


def _group_of(name: str, optim: OptimConfig, *, has_decay: bool, factor: float) -> _Group:
    kind, peak, decay = optim.optimizer, settled(optim.learning_rate_peak), optim.weight_decay
    if name.startswith("encoder.text."):
        kind = optim.text_optimizer or kind
        peak = optim.text_learning_rate_peak or peak
        decay = decay if optim.text_weight_decay is None else optim.text_weight_decay
    if "logit_" in name and optim.logit_scale_learning_rate is not None:
        peak = optim.logit_scale_learning_rate
    return _Group(optimizer=kind, weight_decay=decay if has_decay else 0.0, peak=peak * factor)


def _undecayed(method: nn.Module, *, decayed: str | None) -> set[str]:
    """Name the parameters without weight decay.

    As the original really acts: biases of linear, convolution and norm modules, weights of norms, logit scales; its
    attention biases and class embedding are decayed. By default: everything with less than two dimensions.
    """
    if decayed != "original":
        return {name for name, parameter in method.named_parameters() if parameter.dim() < 2}
    names = {name for name, _ in method.named_parameters() if "logit_" in name}
    for path, module in method.named_modules():
        if isinstance(module, _NORMS):
            names |= {f"{path}.weight", f"{path}.bias"}
        elif isinstance(module, nn.Linear | nn.Conv2d):
            names.add(f"{path}.bias")
    return names


def layer_factor(name: str, method: nn.Module, optim: OptimConfig) -> float:
    """Compute the factor that layer-wise decay puts on a parameter's learning rate.

    It is 1 for heads and the last layers, and times `layer_decay` for each layer below.
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


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give every group its share of the schedule's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]


@torch.no_grad()
def clamp_logit_scales(method: nn.Module, bounds: tuple[float, float]) -> None:
    """Push every logit scale back into its bounds, the lowest and highest logarithm.

    The bias of the sigmoid loss stays between plus and minus the largest scale: it cannot outweigh every cosine.
    """
    for name, parameter in method.named_parameters():
        if "logit_scale" in name:
            parameter.clamp_(*bounds)
        elif "logit_bias" in name:
            parameter.clamp_(-math.exp(bounds[1]), math.exp(bounds[1]))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm stays below a bound; return the norm before, ().

    A bound of inf only measures.
    """
    if math.isinf(max_norm):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)
    return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)


def step_where(optimizers: Iterable[torch.optim.Optimizer], is_good: Tensor) -> None:
    """Take the step of fused optimizers where `is_good`, bool, (), without asking the device whether."""
    skip = (~is_good).float()
    for optimizer in optimizers:
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by fused optimizers, for float16's scaler
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]


class WeightAverage:
    """Exponential moving average of an encoder's parameters and buffers.

    `decay` is the share of the average kept per step; early steps use (1 + n) / (10 + n) where that is less.
    """

    def __init__(self, encoder: DualEncoder, *, decay: float) -> None:
        self._decay = decay
        self.num_updates = 0
        self.state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}

    @torch.no_grad()
    def update(self, encoder: DualEncoder) -> None:
        """Update the average with the weights after a step."""
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, values = [], []
        for name, value in encoder.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)  # one launch on a GPU instead of hundreds

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Continue from a saved average."""
        self.num_updates = num_updates
        for name, value in self.state.items():
            value.copy_(state[name])

    def averaged(self, encoder: DualEncoder) -> DualEncoder:
        """Make a copy of the encoder that has the average for weights."""
        other = copy.deepcopy(encoder)
        other.load_state_dict(self.state)
        return other
