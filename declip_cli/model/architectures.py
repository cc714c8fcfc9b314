"""Names of architectures and their dimensions."""

import difflib
from dataclasses import replace

from declip_cli.config import ModelConfig
from declip_cli.errors import ChoiceError, ConfigError, require
from declip_cli.model.dims import Architecture, ResNetDims, TextDims, VitDims, read_architecture
from declip_cli.model.open_clip_towers import read_installed_config, read_open_clip_model

_TINY_TEXT = TextDims(context_length=24, width=128, num_layers=1, num_heads=4)
_SMALL_TEXT = TextDims(context_length=77, width=384, num_layers=8, num_heads=6)
_LARGE = VitDims(patch_side_px=14, width=1024, num_layers=24, num_heads=16)
_LARGE_TEXT = TextDims(width=768, num_layers=12, num_heads=12)
ARCHITECTURES: dict[str, Architecture] = {
    "vit-b32": Architecture(vision=VitDims(patch_side_px=32, width=768, num_layers=12, num_heads=12)),
    "vit-b16": Architecture(vision=VitDims(patch_side_px=16, width=768, num_layers=12, num_heads=12)),
    "vit-s16": Architecture(vision=VitDims(patch_side_px=16, width=384, num_layers=12, num_heads=6), text=_SMALL_TEXT),
    "vit-tiny64": Architecture(
        image_side_px=64,
        embed_dim=192,
        vision=VitDims(patch_side_px=8, width=192, num_layers=6, num_heads=3),
        text=TextDims(context_length=32, width=192, num_layers=4, num_heads=3),
    ),
    "vit-tiny32": Architecture(
        image_side_px=32,
        embed_dim=128,
        vision=VitDims(patch_side_px=8, width=96, num_layers=4, num_heads=3),
        text=_TINY_TEXT,
    ),
    "vit-b16-336": Architecture(
        image_side_px=336, vision=VitDims(patch_side_px=16, width=768, num_layers=12, num_heads=12)
    ),
    "vit-l14": Architecture(embed_dim=768, vision=_LARGE, text=_LARGE_TEXT),
    "vit-l14-336": Architecture(image_side_px=336, embed_dim=768, vision=_LARGE, text=_LARGE_TEXT),
    "rn50": Architecture(embed_dim=1024, vision=ResNetDims(num_blocks=(3, 4, 6, 3), width=64, num_heads=32)),
    "rn101": Architecture(embed_dim=512, vision=ResNetDims(num_blocks=(3, 4, 23, 3), width=64, num_heads=32)),
    "rn50x4": Architecture(
        image_side_px=288,
        embed_dim=640,
        vision=ResNetDims(num_blocks=(4, 6, 10, 6), width=80, num_heads=40),
        text=TextDims(width=640, num_layers=12, num_heads=10),
    ),
    "rn-tiny64": Architecture(
        image_side_px=64,
        embed_dim=128,
        vision=ResNetDims(num_blocks=(1, 1, 1, 1), width=16, num_heads=8),
        text=_TINY_TEXT,
    ),
}
"""ViT-B, ViT-L and ResNets as in CLIP, arXiv 2103.00020, tables 19 and 20; vit-s16 as in SLIP; tiny ones are ours."""
OPEN_CLIP_PREFIX = "open_clip:"
"""Before the name of a model of the installed OpenCLIP, such as `open_clip:ViT-H-14`."""
OF_INIT = "init"
"""Stands for the architecture of the model that a run starts from."""


def find_architecture(config: ModelConfig) -> Architecture:
    """Look an architecture up and apply the overrides of the configuration.

    Args:
        config: name and overrides.

    Returns:
        The dimensions to build.

    Raises:
        ConfigError: the name is unknown (ChoiceError), or a side does not fit the patches.
    """
    base = _base(config)
    side = config.image_side_px or base.image_side_px
    stride = base.vision.patch_side_px if isinstance(base.vision, VitDims) else 32
    require(
        side > 0 and side % stride == 0,
        f"model.image_side_px must be a multiple of {stride} for {config.arch} (got {side})",
        remedy=f"--set model.image_side_px={max(1, round(side / stride)) * stride}",
    )
    length = config.context_length or base.text.context_length
    require(
        length >= 3,
        f"model.context_length must be at least 3: start, one token, end (got {length})",
        remedy="--set model.context_length=77",
    )
    squashed = config.resize_mode == "squash"
    require(
        config.resize_px in (None, side) or (config.resize_px or 0) > side and not squashed,
        f"model.resize_px must be at least the image's side, and with squash equal to it (got {config.resize_px})",
        remedy=f"--set model.resize_px={side}",
    )
    require(
        config.embed_dim is None or config.embed_dim > 0,
        f"model.embed_dim must be positive (got {config.embed_dim})",
        remedy=f"--set model.embed_dim={base.embed_dim}",
    )
    found = replace(
        base,
        image_side_px=side,
        embed_dim=config.embed_dim or base.embed_dim,
        text=replace(base.text, context_length=length),
    )
    return found if config.quick_gelu is None else found.with_activation(config.quick_gelu)


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Write down what the configuration leaves to its architecture; errors as in `find_architecture`."""
    found = find_architecture(config)
    vision, text = found.vision, found.text
    is_mixed = isinstance(vision, VitDims) and vision.quick_gelu != text.quick_gelu
    return replace(
        config,
        image_side_px=found.image_side_px,
        context_length=text.context_length,
        embed_dim=found.embed_dim,
        quick_gelu=None if is_mixed else text.quick_gelu,
        resize_px=config.resize_px or found.image_side_px,
        resize_mode=config.resize_mode or "shortest",
        interpolation=config.interpolation or "bilinear",
    )


def _base(config: ModelConfig) -> Architecture:
    """Look the dimensions up that the configuration then overrides."""
    if config.architecture:
        try:
            return read_architecture(config.architecture)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"model.architecture describes no model: {error}", remedy="leave it out; --init fills it in"
            ) from error
    if config.arch == OF_INIT:
        raise ConfigError("--arch init is the architecture of --init, which is missing", remedy="--init MODEL")
    if config.arch.startswith(OPEN_CLIP_PREFIX):
        return read_open_clip_model(read_installed_config(config.arch.removeprefix(OPEN_CLIP_PREFIX)))
    if config.arch not in ARCHITECTURES:
        close = difflib.get_close_matches(config.arch, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = f"{', '.join(ARCHITECTURES)}, {OPEN_CLIP_PREFIX}NAME"
        raise ChoiceError(f"unknown architecture {config.arch!r}", remedy=f"{hint}--arch takes {names}")
    return ARCHITECTURES[config.arch]


def name_of(architecture: Architecture) -> str:
    """Find the name of an architecture, whatever its sizes in use and its activation; empty if it has none."""

    def bare(one: Architecture) -> Architecture:
        same = replace(one, image_side_px=0, text=replace(one.text, context_length=0))
        return same.with_activation(True)

    return next((name for name, one in ARCHITECTURES.items() if bare(one) == bare(architecture)), "")
