"""Everything a run can be told, with units and sources; each default stands here and nowhere else."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from declip_cli.errors import ConfigError

ImageView: TypeAlias = Literal["plain", "augmented"]
TextView: TypeAlias = Literal["plain", "augmented", "masked"]
MethodName: TypeAlias = Literal["clip", "slip", "filip", "declip", "defilip"]


def require(condition: bool, message: str, *, remedy: str) -> None:
    """Raise ConfigError unless a condition on the configuration holds.

    Args:
        condition: what must be true.
        message: names the option and the values found and expected.
        remedy: how to mend it.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError(message, remedy=remedy)


def require_fractions(section: str, values: dict[str, float]) -> None:
    """Raise ConfigError unless every value lies in [0, 1].

    Args:
        section: the configuration section, for the message.
        values: key → value.

    Raises:
        ConfigError: a value is outside [0, 1].
    """
    for key, value in values.items():
        require(
            0.0 <= value <= 1.0,
            f"{section}.{key} is a fraction in [0, 1] (got {value})",
            remedy=f"--set {section}.{key}=…",
        )


def require_at_least(lowest: int, section: str, values: dict[str, float]) -> None:
    """Raise ConfigError unless every value is at least as large as a bound.

    Args:
        lowest: the bound.
        section: the configuration section, for the message.
        values: key → value.

    Raises:
        ConfigError: a value is too small.
    """
    rule = f"must be at least {lowest}" if lowest else "cannot be negative"
    for key, value in values.items():
        message = f"{section}.{key} {rule} (got {value})"
        require(value >= lowest, message, remedy=f"--set {section}.{key}={lowest}")


@dataclass(frozen=True, slots=True)
class Views:
    """Which views of a pair a method wants from the loader, in order."""

    images: tuple[ImageView, ...]
    texts: tuple[TextView, ...]
    pad_to_context: bool = False
    """Pad tokens to the context length instead of the batch's longest text (original FILIP scores padding)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The dual encoder."""

    arch: str = "vit-b32"
    """A name of `model/architectures.py`."""
    image_side_px: int = 0
    """Side of the square picture the model sees; 0 takes the architecture's own."""
    context_length: int = 0
    """Longest text in tokens, start and end included; 0 takes the architecture's own (77, or less if tiny)."""
    embed_dim: int = 0
    """Width of the shared embedding; 0 takes the architecture's own."""
    quick_gelu: bool = True
    """x·sigmoid(1.702x), as OpenAI and the original; false is the exact GELU."""
    gradient_checkpointing: bool = False
    """Keep only block inputs in memory and compute the rest again: about a third more time, much less memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How views are drawn; the defaults are the original's (P/data/transforms.py)."""

    mode: Literal["exact", "fused"] = "fused"
    """`exact`: colour operations one after the other, clipped between, as Pillow does; `fused`: all of them as one
    colour matrix, about a third faster. Fused does not clip between operations and turns hue in YIQ."""
    plain_crop_area_min: float = 0.5
    """Smallest share of the picture in a `plain` view (STANDARD_SLIP)."""
    crop_area_min: float = 0.2
    """Smallest share of the picture in an `augmented` view (MOCOV2)."""
    jitter_probability: float = 0.8
    brightness: float = 0.4
    """Half width of the factor's range around 1; contrast and saturation likewise."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Largest hue rotation, in turns."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma_min_px: float = 0.1
    blur_sigma_max_px: float = 2.0
    flip_probability: float = 0.5
    """Horizontal flips of `augmented` views; `plain` views are never flipped."""
    text_operations: tuple[str, ...] = ("synonym", "swap", "delete")
    """What an `augmented` text draws from, evenly (P/model/declip.py:203-212); empty leaves the text alone."""
    deletion_probability: float = 0.1
    """Chance of each word to go, in `delete`."""
    mask_probability: float = 0.15
    """Share of tokens to predict in a `masked` text; of these 80 % masked, 10 % random, 10 % kept."""

    def __post_init__(self) -> None:
        fractions: tuple[str, ...] = (
            "plain_crop_area_min",
            "crop_area_min",
            "jitter_probability",
            "brightness",
            "contrast",
        )
        fractions += ("saturation", "grayscale_probability", "blur_probability", "flip_probability")
        fractions += ("deletion_probability", "mask_probability")
        require_fractions("augment", {key: getattr(self, key) for key in fractions})
        require(
            0.0 <= self.hue <= 0.5,
            f"augment.hue is in [0, 0.5] (got {self.hue})",
            remedy="--set augment.hue=0.1",
        )
        require(
            self.blur_sigma_min_px <= self.blur_sigma_max_px,
            "augment.blur_sigma_min_px must not exceed blur_sigma_max_px "
            f"(got {self.blur_sigma_min_px}, {self.blur_sigma_max_px})",
            remedy="--set augment.blur_sigma_min_px=0.1",
        )
        unknown = set(self.text_operations) - {"synonym", "swap", "delete"}
        require(
            not unknown,
            f"augment.text_operations has unknown names {sorted(unknown)}",
            remedy="choose from synonym, swap, delete",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how they are loaded."""

    path: tuple[str, ...] = ()
    """Shard folders made by `declip prepare`, tar patterns, or `demo`."""
    workers: int = -1
    """Loader threads beside the training thread; -1 chooses from the cores there are, 0 loads in line."""
    cache_dir: str = ""
    """Where remote shards are kept; empty uses `$DECLIP_CACHE`, else `~/.cache/declip`."""
    max_bad: float = 0.05
    """Largest share of samples that may be unreadable before the run stops."""
    part: str = ""
    """Named part of the demo corpus (`train`, `fit`, `validation`); empty is all training pairs."""

    def __post_init__(self) -> None:
        require_fractions("data", {"max_bad": self.max_bad})
        require_at_least(-1, "data", {"workers": self.workers})


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """The objective."""

    name: MethodName = "declip"
    faithful: bool = False
    """Reproduce the original code including its quirks; the table of differences is in the README."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each loss term; terms left out keep the method's own. 0 switches a term off."""
    pairs: Literal[1, 2, 4] = 4
    """Image-text pairs in the contrastive loss: 1 = first views; 2 = both images, first text; 4 = all."""
    queue_size: int = 65536
    """Rows of the nearest-neighbour queue (2^16 in the paper)."""
    token_wise_top_k: int = 16
    """Tokens of each text and picture that are gathered in the token-wise loss: those most relevant to its pair."""
    simclr_temperature: float = 0.1
    label_smoothing: float = 0.0
    """Of the contrastive losses between pictures and texts, in [0, 1]."""

    def __post_init__(self) -> None:
        require_at_least(1, "method", {"queue_size": self.queue_size, "token_wise_top_k": self.token_wise_top_k})
        require_at_least(0, "method.weights", self.weights)
        require_fractions("method", {"label_smoothing": self.label_smoothing})
        require(
            self.simclr_temperature > 0,
            f"method.simclr_temperature must be positive (got {self.simclr_temperature})",
            remedy="--set method.simclr_temperature=0.1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule; the defaults are the original's YFCC15M recipe."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    text_optimizer: Literal["", "adamw", "sgd"] = ""
    """Optimizer of the text tower alone; empty: the same (the paper's ViT used AdamW and SGD, DeCLIP issue #17)."""
    learning_rate_peak: float = 1e-3
    learning_rate_start: float = -1.0
    """Rate of step 1; warm-up is linear from here to the peak. -1: a tenth of the peak, as in the original."""
    learning_rate_end: float = 0.0
    text_learning_rate_peak: float = 0.0
    """Peak of the text tower; 0: the same as the rest."""
    logit_scale_learning_rate: float = -1.0
    """Peak of the logit scales; -1: the same as the rest; 0 freezes them."""
    warmup_steps: int = -1
    """Steps up to the peak; -1: 2500, or a tenth of the run where that is less."""
    weight_decay: float = 0.1
    text_weight_decay: float = -1.0
    """Decay of the text tower; -1: the same as the rest."""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    momentum: float = 0.9
    """Of SGD, with Nesterov's correction."""
    gradient_clip_norm: float = 0.0
    """Largest L2 norm of all gradients together; 0 does not clip."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer from the output down to the input; 1 is off."""

    def __post_init__(self) -> None:
        require(
            self.learning_rate_peak > 0,
            f"--learning-rate must be positive (got {self.learning_rate_peak})",
            remedy="--learning-rate 1e-3",
        )
        for key in ("learning_rate_end", "text_learning_rate_peak"):
            require_at_least(0, "optim", {key: getattr(self, key)})
        require(
            self.learning_rate_start <= self.learning_rate_peak,
            "optim.learning_rate_start must not exceed the peak "
            f"(got {self.learning_rate_start}, {self.learning_rate_peak})",
            remedy="--set optim.learning_rate_start=0",
        )
        for key in ("weight_decay", "gradient_clip_norm", "momentum"):
            require_at_least(0, "optim", {key: getattr(self, key)})
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optim.{key} is in [0, 1) (got {value})", remedy=f"--set optim.{key}=0.9")
        require(
            0 < self.layer_decay <= 1,
            f"optim.layer_decay is in (0, 1] (got {self.layer_decay})",
            remedy="--set optim.layer_decay=0.75",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: float = 0.0
    """Passes over the data; 0 with steps = 0 takes 32, the paper's."""
    steps: int = 0
    """Optimizer steps; overrides epochs."""
    batch_size: int = 256
    """Pairs per step on each process."""
    micro_batch_size: int = 0
    """Pairs per forward pass; 0 is the whole batch. The gradient is that of the whole batch (GradCache)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the processor computes it natively, else fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0
    """CPU threads of this process, loader threads included; 0 takes the cores there are."""
    seed: int = 0
    log_every_steps: int = 10
    checkpoint_every_steps: int = 0
    checkpoint_every_minutes: float = 15.0
    eval: tuple[str, ...] = ()
    """Evaluations during training: names or folders as `zeroshot` and `retrieve` take them."""
    eval_every_steps: int = 0
    """0 evaluates once, at the end."""
    time_limit_s: float = 0.0
    """Stop early, with the schedule ending there, after this time; 0 is no limit."""
    ema_decay: float = 0.0
    """Decay per step of the running average of the weights; 0 is off. The averaged model is the one saved."""
    freeze: tuple[Literal["image", "text"], ...] = ()
    compile: bool = False
    """torch.compile on both towers."""
    init: str = ""
    """Model to start from; empty starts from random weights."""
    logit_scale_init: float = 2.6593
    """ln(1/0.07)."""
    logit_scale_min: float = -1.0
    """Lower bound of the logarithm of the logit scale; -1: 0 (ln 1), in the faithful mode 3."""
    logit_scale_max: float = -1.0
    """Upper bound; -1: 4.6052 (ln 100), in the faithful mode 6."""
    tracker: Literal["", "tensorboard", "wandb"] = ""
    processes: int = 0
    """Processes to start; 0: one per GPU, else 1. Ignored under a launcher that already set the ranks."""

    def __post_init__(self) -> None:
        at_least_0: tuple[str, ...] = ("epochs", "steps", "micro_batch_size", "threads", "time_limit_s", "processes")
        at_least_0 += ("checkpoint_every_steps", "checkpoint_every_minutes", "eval_every_steps")
        require_at_least(0, "train", {key: getattr(self, key) for key in at_least_0})
        require_at_least(1, "train", {"log_every_steps": self.log_every_steps})
        require(
            self.batch_size >= 2,
            f"--batch-size must be at least 2, a contrastive loss needs negatives (got {self.batch_size})",
            remedy="--batch-size 256",
        )
        require(
            0.0 <= self.ema_decay < 1.0,
            f"train.ema_decay is in [0, 1) (got {self.ema_decay})",
            remedy="--set train.ema_decay=0.9999",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One pre-training run, whole."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
