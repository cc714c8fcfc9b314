"""All settings of a run, with units and sources; each default stands here and nowhere else.

None leaves a choice to `resolve.py`, which writes down what was chosen; on the command line and in TOML it is `none`.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from declip_cli.errors import require
from declip_cli.rules import AtLeast0, AtLeast1, Fraction, FractionBelow1, NotNegative, Positive, Rule, check_rules

ImageView: TypeAlias = Literal["plain", "augmented", "whole"]
TextView: TypeAlias = Literal["plain", "augmented", "masked", "keywords", "augmented_keywords"]
MethodName: TypeAlias = Literal["clip", "slip", "filip", "declip", "defilip", "rocket", "aclip"]


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
    """A name of `model/architectures.py`; `open_clip:` and one of the installed OpenCLIP's; `init`: that of `init`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Every dimension, in place of those that `arch` stands for: of the model that `train.init` starts from."""
    image_side_px: int | None = None
    """Side of the square image the model sees; None: the architecture's own."""
    context_length: int | None = None
    """Longest text in tokens, start and end included; None: the architecture's own (77, or less if tiny)."""
    embed_dim: int | None = None
    """Width of the shared embedding; None: the architecture's own."""
    quick_gelu: bool | None = None
    """x·sigmoid(1.702x), as OpenAI and the original; false is the exact GELU; None: the architecture's own."""
    resize_px: int | None = None
    """Shorter side of an image before the center crop of evaluations; None: the image's side, as OpenCLIP does it."""
    resize_mode: Literal["shortest", "squash"] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of evaluations, too; None: `shortest` and `bilinear`."""
    gradient_checkpointing: bool = False
    """Keep only block inputs in memory and compute the rest again: about a third more time, much less memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How views are drawn; the defaults are the original's (Sense-GVT/DeCLIP, prototype/data/transforms.py)."""

    plain_crop_area_min: Fraction = 0.5
    """Smallest share of the image in a `plain` view (STANDARD_SLIP)."""
    crop_area_min: Fraction = 0.2
    """Smallest share of the image in an `augmented` view (MOCOV2)."""
    jitter_probability: Fraction = 0.8
    brightness: Fraction = 0.4
    """Half width of the factor's range around 1; contrast and saturation in the same way."""
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Rule("is in [0, 0.5]", lambda hue: 0 <= hue <= 0.5)] = 0.1
    """Largest hue rotation, in turns."""
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_sigma_min_px: float = 0.1
    blur_sigma_max_px: float = 2.0
    flip_probability: Fraction = 0.5
    """Horizontal flips of `augmented` views; `plain` views are never flipped."""
    text_operations: tuple[Literal["synonym", "swap", "delete"], ...] = ("synonym", "swap", "delete")
    """What an `augmented` text draws from, evenly; may repeat; empty leaves the text as it is (Sense-GVT/DeCLIP,
    prototype/model/declip.py:203-212)."""
    stop_word_probability: Fraction = 0.8
    """Chance that a text of kind `keywords` loses all its stop words (CLIP:rocket, arXiv 2305.08675)."""
    deletion_probability: Fraction = 0.1
    """Probability that `delete` omits a word."""
    mask_probability: Fraction = 0.15
    """Share of tokens to predict in a `masked` text; of these 80 % masked, 10 % random, 10 % kept."""

    def __post_init__(self) -> None:
        check_rules("augment", self)
        require(
            self.blur_sigma_min_px <= self.blur_sigma_max_px,
            "augment.blur_sigma_min_px must not exceed blur_sigma_max_px "
            f"(got {self.blur_sigma_min_px}, {self.blur_sigma_max_px})",
            remedy="--set augment.blur_sigma_min_px=0.1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how they are loaded."""

    path: tuple[str, ...] = ()
    """Shard folders made by `declip prepare`, tar patterns, or `demo`."""
    workers: AtLeast0 | None = None
    """Loader threads beside the training thread; 0 loads in line; None depends on the available cores."""
    loader: Literal["threads", "processes"] | None = None
    """Where those threads are: in this process, or a few in each of some worker processes, so that they do not slow
    down the thread that launches a GPU's work. None: processes beside a GPU, else threads."""
    order: Literal["exact", "blocks"] | None = None
    """`exact`: one shuffle of all pairs, each read by itself; `blocks`: shards are read in blocks of some MB, shuffled,
    and pairs are shuffled among the open ones. None: blocks for remote shards and for more than the memory holds."""
    streams: AtLeast1 | None = None
    """Streams into which `blocks` are divided; ranks read different ones. None: up to 64, a divisor of the batch."""
    open_blocks: AtLeast1 = 128
    """Blocks among which pairs are shuffled, at least, in all streams together; all blocks make an exact shuffle."""
    cache_dir: str | None = None
    """Where remote shards are kept; None: `$DECLIP_CACHE`, else `~/.cache/declip`."""
    cache_gb: NotNegative = 100.0
    """How much of them may be there, of all runs on this machine together."""
    max_bad: Fraction = 0.05
    """Largest share of samples that may be unreadable before the run stops."""
    split: str | None = None
    """Named split of the data (of the demo: `train`, `fit`, `validation`); None: all training pairs."""

    def __post_init__(self) -> None:
        check_rules("data", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """The objective. Switches that are None follow `faithful`; see `presets.py`."""

    name: MethodName = "declip"
    faithful: bool = False
    """Preset of the switches below and of `optim.decayed`, `optim.gradient_clip_norm`, `train.logit_scale_min` and
    `train.logit_scale_max`: true reproduces the original code, quirks included."""
    weights: dict[str, NotNegative] = field(default_factory=dict)
    """Weight of each loss term; terms left out keep the method's own. 0 switches a term off."""
    pairs: Literal[1, 2, 4] = 4
    """Image-text pairs in the contrastive loss: 1 = first views; 2 = both images, first text; 4 = all."""
    captions: AtLeast1 = 1
    """Captions of a pair that its texts show in a step, drawn again each time; where there are fewer, they repeat. The
    method sees as many texts, if need be (clip, slip; declip and defilip with `pairs` = 4)."""
    queue_size: AtLeast1 = 65536
    """Rows of the nearest-neighbor queue (2^16 in the paper)."""
    token_wise_top_k: AtLeast1 = 16
    """Tokens of each text and image that are gathered in the token-wise loss: those most relevant to its pair."""
    head_width: AtLeast1 | None = None
    """Width of the hidden layers of SimSiam's, SimCLR's, BYOL's and rocket's heads; None: 1,024 and else 4,096, as the
    papers have it, which beside a tiny tower takes most of the time."""
    simclr_temperature: Positive = 0.1
    label_smoothing: Fraction = 0.0
    """Of the contrastive losses between images and texts, in [0, 1]; the softmax only."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """Loss between whole images and texts: CLIP's, or SigLIP's (arXiv 2303.15343) with a learned bias."""
    positives: Literal["pair", "caption"] = "pair"
    """Which texts of a batch belong to an image in the losses between images and texts: its own only, or every text of
    the same caption as well (same tokens; UniCL, arXiv 2204.03610)."""
    strong_label_smoothing: Fraction = 0.1
    """Label smoothing between rocket's strong views, in place of `label_smoothing`."""
    kept_patches: Annotated[float, Rule("is in (0, 1]", lambda share: 0 < share <= 1)] = 0.5
    """Share of the patches that aclip keeps of each view: those that its teacher attends to most."""
    teacher_momentum: FractionBelow1 = 0.996
    """Share of aclip's teacher that each step leaves at the start of the run; it rises to 1 as a cosine falls."""
    nn_symmetric: bool | None = None
    """Match neighbor → image as well as image → neighbor; the original has the latter only (Sense-GVT/DeCLIP,
    prototype/model/declip.py:281-300)."""
    nn_exclude_own: bool | None = None
    """Never return a pair's own caption of an earlier epoch as its neighbor."""
    queue_start: Literal["empty", "random"] | None = None
    """What the queue holds at first: nothing, or random directions that may be returned (original)."""
    queue_scope: Literal["global", "rank"] | None = None
    """Whose features a rank's queue takes: all ranks', or its own only (original)."""
    mlm_mean: Literal["global", "rank"] | None = None
    """Masked tokens the masked-language loss is averaged over: all ranks', or each rank's own (original)."""
    mask_special_ids: bool | None = None
    """Let random replacements in masked texts be special tokens too, as the original does."""
    score_padding: bool | None = None
    """Compare padding tokens in the token-wise loss, at full context length, as the original does."""
    filip_text: Literal["plain", "masked"] | None = None
    """Text that FILIP learns from; the original feeds the masked one, without a masked-language loss."""
    cap_logit_scale: bool | None = None
    """Cap the exponentiated scale at 100 in forward, with full gradient (original's CLIP, DeCLIP and DeFILIP)."""
    batch_norm: Literal["global", "rank"] | None = None
    """Batch that BatchNorm sees: all ranks', or each rank's own (original)."""
    freeze_patch_embed: bool | None = None
    """Keep a ViT's patch embedding at its random start, as the original does."""

    def __post_init__(self) -> None:
        check_rules("method", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    text_optimizer: Literal["adamw", "sgd"] | None = None
    """Optimizer of the text tower; None: the same (the paper's ViT used AdamW and SGD, DeCLIP issue #17)."""
    learning_rate_peak: float | None = None
    """None: 1e-3 · sqrt(global batch / 4,096) with AdamW, the original's at 4,096 (arXiv 2205.10287); SGD has none."""
    learning_rate_start: NotNegative | None = None
    """Rate of the first step; warm-up is linear from here to the peak. None: a tenth of the peak (original)."""
    learning_rate_end: NotNegative = 0.0
    text_learning_rate_peak: NotNegative | None = None
    """Peak of the text tower; None: the same as the rest."""
    logit_scale_learning_rate: NotNegative | None = None
    """Peak of the logit scales and the bias; None: the same as the rest; 0 freezes them."""
    warmup_steps: AtLeast0 | None = None
    """Steps up to the peak; None: 2,500 (original), or a tenth of the run where that is less."""
    warmup_samples: AtLeast0 | None = None
    """The same in pairs seen; overrides `warmup_steps`. What a resolved run keeps."""
    warmup_in_full: bool | None = None
    """With a time limit, a tenth of the time does not end the warm-up. None: where the length was asked for."""
    weight_decay: NotNegative = 0.1
    text_weight_decay: NotNegative | None = None
    """Decay of the text tower; None: the same as the rest."""
    decayed: Literal["matrices", "original"] | None = None
    """`original`: attention biases and the class embedding too, as its groups act. None: see `method.faithful`."""
    beta1: FractionBelow1 = 0.9
    beta2: FractionBelow1 = 0.98
    epsilon: float = 1e-8
    momentum: NotNegative = 0.9
    """Of SGD, with Nesterov's correction."""
    gradient_clip_norm: Annotated[float, Rule("must be positive", lambda norm: norm > 0)] | None = None
    """Largest L2 norm of all gradients together; inf never clips. None: 1, or inf with `method.faithful`."""
    layer_decay: Annotated[float, Rule("is in (0, 1]", lambda decay: 0 < decay <= 1)] = 1.0
    """Factor on the learning rate per layer from the output down to the input; 1 is off."""

    def __post_init__(self) -> None:
        check_rules("optim", self)
        if self.learning_rate_peak is not None:
            require(
                0 < self.learning_rate_peak < math.inf,
                f"--learning-rate must be positive (got {self.learning_rate_peak})",
                remedy="--learning-rate 1e-3",
            )
            start = 0.0 if self.learning_rate_start is None else self.learning_rate_start
            require(
                start <= self.learning_rate_peak,
                "optim.learning_rate_start must not exceed the peak "
                f"(got {self.learning_rate_start}, {self.learning_rate_peak})",
                remedy="--set optim.learning_rate_start=0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: Positive | None = None
    """Passes over the data; None: 32, the paper's."""
    steps: AtLeast1 | None = None
    """Optimizer steps; overrides `epochs`."""
    samples: AtLeast1 | None = None
    """Pairs to see in all; overrides both. What a resolved run keeps, so that other hardware changes no end."""
    batch_size: int = 256
    """Pairs per step on each process."""
    micro_batch_size: AtLeast1 | None = None
    """Pairs per forward pass; None: the whole batch. The gradient is that of the whole batch (GradCache)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where it is computed natively, else fp16 on a GPU with tensor cores, else fp32."""
    tf32: bool = True
    """Let a GPU round the factors of float32 products to TF32's 10 bits, as the original's PyTorch did."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: AtLeast1 | None = None
    """CPU threads of this process, loader threads included; None uses all available cores."""
    seed: int = 0
    log_every_steps: AtLeast1 = 10
    checkpoint_every_steps: AtLeast1 | None = None
    checkpoint_every_minutes: Positive | None = 15.0
    keep_states: AtLeast1 = 2
    """Newest states that are kept; a damaged one falls back to the one before."""
    keep_best: str | None = None
    """Score by which the best model is kept in `best/`, such as `imagenet.top1`; of an evaluation in `eval`."""
    assume: tuple[str, ...] = ()
    """What the checkpoint that `init` names does not say itself, KEY=VALUE, such as `activation=gelu`."""
    eval: tuple[str, ...] = ()
    """Evaluations during training: names or folders as `zeroshot` and `retrieve` take them."""
    eval_every_steps: AtLeast1 | None = None
    """None evaluates once, at the end."""
    time_limit_s: Positive | None = None
    """Stop early, with the schedule ending there, after this time."""
    ema_decay: FractionBelow1 | None = None
    """Decay per step of the running average of the weights; the averaged model is the one saved. None: off."""
    freeze: tuple[Literal["image", "text"], ...] = ()
    compile: Literal["auto", True, False] = "auto"
    """Compile what a step computes. `auto`: on a GPU with Triton, after a few steps, if the rest takes over an hour."""
    init: str | None = None
    """Model to start from; None starts from random weights."""
    logit_scale_init: float | None = None
    """Logarithm of the logit scales at the start, but of rocket's strong views. None: ln(1 / 0.07), sigmoid: ln 10."""
    logit_bias_init: float | None = None
    """Bias of the sigmoid loss at the start. None: −ln(global batch); the paper's is −10, for 32,768 pairs."""
    logit_scale_min: float | None = None
    """Lower bound of the logarithm of the logit scales. None: 0 (ln 1), with `method.faithful` 3."""
    logit_scale_max: float | None = None
    """Upper bound. None: 4.6052 (ln 100), with `method.faithful` 6."""
    max_bad_steps: AtLeast1 = 10
    """Broken batches in a row, each skipped and counted, after which the run returns to the last good state."""
    max_rollbacks: AtLeast0 = 3
    """How often that may happen, each time at half the rate, before the run ends with an error."""
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """Where every report goes besides `metrics.jsonl`. TensorBoard's files lie in the run folder; MLflow's place is
    `MLFLOW_TRACKING_URI`. A resumed run continues in the same record."""
    processes: AtLeast1 | None = None
    """Processes to start; None: one per GPU, else 1. Ignored under a launcher that already set the ranks."""

    def __post_init__(self) -> None:
        check_rules("train", self)
        require(
            self.batch_size >= 2,
            f"--batch-size must be at least 2, a contrastive loss needs negatives (got {self.batch_size})",
            remedy="--batch-size 256",
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
