"""Start from another model (`--init`): adopt its architecture, refuse what contradicts it, copy its weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.config import ModelConfig, RunConfig
from declip_cli.errors import TrainError
from declip_cli.interop.assumptions import parse_assumptions
from declip_cli.interop.read import describe_model, load_model
from declip_cli.methods.base import Method
from declip_cli.model.architectures import OF_INIT, find_architecture, name_of
from declip_cli.model.dims import Architecture, ResNetDims, VitDims, describe_architecture
from declip_cli.model.preprocessing import Preprocessing

_TOWER_SIZES = ("patch_side_px", "num_blocks", "width", "num_layers", "mlp_ratio")
_OPTION = "--init"


def take_over(asked: RunConfig, log: Callable[[str], None] = lambda line: None) -> RunConfig:
    """Let a run have the architecture and the preprocessing of the model that it starts from.

    Its size is compared with `--arch`, or taken over with `--arch init`. All else is taken over (activation, heads,
    epsilon, layer norm before the blocks, context length, resizing, filter), and settings must not contradict it.
    Another image side is no contradiction for a ViT: its positions are interpolated.

    Args:
        asked: of a new run; without `train.init` it is returned as it is.
        log: receives notes on what had to be assumed of the model.

    Returns:
        The same with `model` filled in.

    Raises:
        TrainError: a setting contradicts the model.
        ModelError: it cannot be read.
    """
    if not asked.train.init:
        return asked
    given = parse_assumptions(asked.train.assume)
    start = describe_model(Path(asked.train.init), option=_OPTION, given=given, log=log)
    model, theirs = asked.model, start.architecture
    _check_settings(model, theirs, asked)
    if model.arch != OF_INIT:
        _check_sizes(find_architecture(model), theirs, asked)
    side = model.image_side_px or theirs.image_side_px
    resize = model.resize_px or _resize_px(start.preprocessing, side)
    if resize and not model.resize_px:
        log(
            f"images are resized to {resize} px before the crop to {side}, as for {asked.train.init}; OpenCLIP "
            f"cannot say that, and reads the run's model with --set model.resize_px={side} only"
        )
    if start.preprocessing.crop_at == "floor":
        log("half of an odd margin is rounded to even here, and down in that model: crops may differ by one pixel")
    taken = replace(
        model,
        arch=(name_of(theirs) or OF_INIT) if model.arch == OF_INIT else model.arch,
        architecture=describe_architecture(replace(theirs, image_side_px=side)),
        image_side_px=side,
        context_length=theirs.text.context_length,
        embed_dim=theirs.embed_dim,
        resize_px=resize,
        resize_mode=model.resize_mode or start.preprocessing.resize_mode,
        interpolation=model.interpolation or start.preprocessing.interpolation,
    )
    return replace(asked, model=taken)


def _resize_px(preprocessing: Preprocessing, side: int) -> int | None:
    """Scale the length to which the shorter side is resized to another image side; None where it is that side."""
    resize = round(preprocessing.resize_px * side / preprocessing.image_side_px)
    return resize if resize != side else None


def _check_sizes(mine: Architecture, theirs: Architecture, asked: RunConfig) -> None:
    """Refuse towers that `--arch` does not mean."""
    pairs: list[tuple[str, Any, Any]] = [("the kind of the image tower", type(mine.vision), type(theirs.vision))]
    for tower in ("vision", "text"):
        one, another = getattr(mine, tower), getattr(theirs, tower)
        for field in _TOWER_SIZES:
            name = f"{field} of the {'image' if tower == 'vision' else tower} tower"
            pairs.append((name, getattr(one, field, None), getattr(another, field, None)))
    pairs.append(("the width of the shared embedding (model.embed_dim)", mine.embed_dim, theirs.embed_dim))
    _refuse(pairs, asked, remedy=f"--arch {name_of(theirs) or OF_INIT}, which is the model's own")


def _check_settings(model: ModelConfig, theirs: Architecture, asked: RunConfig) -> None:
    """Refuse settings that were made and are not the model's."""
    vision = theirs.vision
    activations = {theirs.text.quick_gelu, vision.quick_gelu if isinstance(vision, VitDims) else theirs.text.quick_gelu}
    settings: list[tuple[str, str, Any, Any]] = [
        ("quick_gelu", "the activation", None if model.quick_gelu is None else {model.quick_gelu}, activations),
        ("context_length", "the context length", model.context_length, theirs.text.context_length),
        ("embed_dim", "the width of the shared embedding", model.embed_dim, theirs.embed_dim),
    ]
    if isinstance(vision, ResNetDims):
        settings.append(("image_side_px", "the side of the image", model.image_side_px, theirs.image_side_px))
    for key, name, mine, its in settings:
        if mine is not None:
            remedy = f"--set model.{key}=none, which copies it from the model"
            _refuse([(f"{name} (model.{key})", mine, its)], asked, remedy=remedy)


def _refuse(pairs: list[tuple[str, Any, Any]], asked: RunConfig, *, remedy: str) -> None:
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise TrainError(
                f"--init {asked.train.init} does not fit --arch {asked.model.arch}: {name} differs "
                f"({_words(mine)} asked for, {_words(theirs)} there)",
                remedy=remedy,
            )


def _words(value: object) -> str:
    if isinstance(value, set):
        return " and ".join(sorted("QuickGELU" if one else "GELU" for one in value))
    return {VitDims: "a ViT", ResNetDims: "a ResNet"}[value] if isinstance(value, type) else str(value)


def start_from(method: Method, config: RunConfig) -> None:
    """Copy the weights of the model that `train.init` names, and how it normalizes pixels.

    Raises:
        TrainError: they do not fit.
        ModelError: it cannot be read.
    """
    given = parse_assumptions(config.train.assume)
    start = load_model(Path(str(config.train.init)), option=_OPTION, given=given)
    theirs, ours = start.encoder.state_dict(), method.encoder.state_dict()
    name = "visual.positional_embedding"
    if name in theirs and name in ours and theirs[name].shape != ours[name].shape:
        theirs[name] = resize_positions(theirs[name], len(ours[name]) - 1)
    wrong = [name for name, value in ours.items() if name in theirs and theirs[name].shape != value.shape]
    missing = [name for name in ours if name not in theirs and not name.startswith(("token_wise.", "logit_bias"))]
    if wrong or missing:
        raise TrainError(
            f"--init {config.train.init} does not fit --arch {config.model.arch}: {(wrong + missing)[0]} differs",
            remedy=f"--arch {OF_INIT}, which is the model's own",
        )
    method.encoder.load_state_dict(ours | {name: theirs[name] for name in ours if name in theirs})
    method.encoder.set_pixels(start.encoder.pixel_mean.tolist(), start.encoder.pixel_std.tolist())


def resize_positions(embedding: Tensor, num_patches: int) -> Tensor:
    """Interpolate a ViT's positional embedding for another number of patches, as OpenCLIP does it.

    Args:
        embedding: of the class token and P patches in a square, (1 + P, E).
        num_patches: P', a square number.

    Returns:
        (1 + P', E).

    Source: open_clip/model.py, `resize_pos_embed`.
    """
    old, new = round((len(embedding) - 1) ** 0.5), round(num_patches**0.5)
    grid = embedding[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]  # (1, E, √P, √P)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding[:1], grid[0].flatten(1).T])
