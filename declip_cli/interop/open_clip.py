"""Checkpoints of OpenCLIP and OpenAI, whose parameter names are ours but for a prefix."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import DAMAGED, ForeignModel, translated, with_mask_token
from declip_cli.interop.other_open_clip import read_other_open_clip
from declip_cli.interop.other_towers import OtherTowers
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.dims import Architecture, VitDims
from declip_cli.model.open_clip_towers import OtherTowersError, read_installed_config, read_open_clip_model
from declip_cli.model.preprocessing import OPENAI_MEAN, OPENAI_STD
from declip_cli.model.shapes import Untraced

_IGNORED = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Values of OpenAI's archives, and the bias of a sigmoid loss, which shifts all similarities alike."""
_TRAINED_AS = re.compile(r"(?:^|-)model_([A-Za-z0-9._-]+?)-lr_")
"""In the name that OpenCLIP's trainer gives a run and writes into its checkpoints."""


def read_openai(checkpoint: Checkpoint, assumptions: Assumptions) -> ForeignModel:
    """Translate a model of OpenAI's: heads are 64 wide, QuickGELU, images as in its `_transform`.

    Source: openai/CLIP, clip/model.py (build_model), clip/clip.py.
    """
    state = _own_names(checkpoint.state)
    quick_gelu = assumptions.take("activation", True, True, words="")
    untraced = Untraced(
        vision_heads=assumptions.given.get("heads"),
        text_heads=assumptions.given.get("text_heads"),
        vision_quick_gelu=quick_gelu,
        text_quick_gelu=quick_gelu,
    )
    pixels = {"interpolation": "bicubic", "mean": OPENAI_MEAN, "std": OPENAI_STD}
    return translated(
        checkpoint, state, untraced, project="openai", method="clip", pixels=pixels, assumptions=assumptions
    )


def read_open_clip(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, assumptions: Assumptions
) -> ForeignModel | OtherTowers:
    """Translate a model of OpenCLIP's.

    Args:
        checkpoint: its parameters.
        config: `open_clip_config.json`; None for a file of weights alone.
        assumptions: decide what no configuration says.

    Returns:
        The model.

    Raises:
        ModelError: nobody can build its towers, or weights and configuration contradict each other.
    """
    model_config = config["model_cfg"] if config is not None else _trained_config(checkpoint.facts)
    pixels = _pixels(config.get("preprocess_cfg", {}) if config is not None else None, assumptions)
    try:
        expected = read_open_clip_model(model_config) if model_config is not None else None
    except OtherTowersError as other:
        assert model_config is not None
        return read_other_open_clip(checkpoint, model_config, pixels, assumptions, reason=other.message)
    state = _own_names(checkpoint.state)
    untraced = _from_config(expected, assumptions) if expected is not None else _assumed(state, assumptions)
    found = translated(
        checkpoint, state, untraced, project="open_clip", method="clip", pixels=pixels, assumptions=assumptions
    )
    if (
        config is not None
        and expected is not None
        and not {"activation", "heads", "text_heads"} & set(assumptions.given)
    ):
        _check_same(expected, found.architecture)
    return found


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put text parameters under `text.`; make the projection a linear layer; add bias and mask token."""
    ours = {}
    for name, value in state.items():
        if name not in _IGNORED:
            ours[name if name.startswith(("visual.", "logit_", "text.")) else f"text.{name}"] = value
    ours.pop("text.attn_mask", None)
    try:
        projection = ours.pop("text.text_projection", None)
        if projection is not None:  # a matrix without bias, transposed
            ours["text.text_projection.weight"] = projection.T.contiguous()
        weight = ours["text.text_projection.weight"]
        if "text.text_projection.bias" not in ours:
            ours["text.text_projection.bias"] = weight.new_zeros(len(weight))
        ours["text.token_embedding.weight"] = with_mask_token(ours["text.token_embedding.weight"])
        scalars = [name for name in ("logit_scale", "logit_bias") if name in ours]
        ours |= {name: ours[name].reshape(()) for name in ["logit_scale", *scalars]}
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"it is not a complete CLIP model: {error}", remedy=DAMAGED) from error
    return ours


def _trained_config(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Look up the model that a run of OpenCLIP's trainer was named after; None where its name does not tell."""
    found = _TRAINED_AS.search(str(facts.get("name", "")))
    if found is None:
        return None
    try:
        return read_installed_config(found[1].replace("ViT-B/", "ViT-B-"))
    except ModelError:
        return None


def _from_config(expected: Architecture, assumptions: Assumptions) -> Untraced:
    vision, text = expected.vision, expected.text
    quick_gelu = assumptions.take("activation", text.quick_gelu, True, words="")
    return Untraced(
        vision_heads=assumptions.take("heads", vision.num_heads, 1, words=""),
        text_heads=assumptions.take("text_heads", text.num_heads, 1, words=""),
        vision_quick_gelu=quick_gelu,
        text_quick_gelu=quick_gelu,
        vision_norm_eps=vision.norm_eps if isinstance(vision, VitDims) else 1e-5,
        text_norm_eps=text.norm_eps,
    )


def _assumed(state: Mapping[str, Tensor], assumptions: Assumptions) -> Untraced:
    """Decide what a file of weights alone does not say: as OpenCLIP's own configurations have it."""
    quick_gelu = assumptions.take(
        "activation", None, False, words="the activation is the exact GELU, as in most of OpenCLIP's models"
    )
    usual = None  # by the width of the tower, see `Untraced`
    return Untraced(
        vision_heads=assumptions.take(
            "heads", None, usual, words="attention heads are 64 wide (80 to 104 in ViT-H to G)"
        ),
        text_heads=assumptions.given.get("text_heads"),
        vision_quick_gelu=quick_gelu,
        text_quick_gelu=quick_gelu,
    )


def _pixels(given: Mapping[str, Any] | None, assumptions: Assumptions) -> dict[str, Any]:
    """Read `preprocess_cfg`; what it leaves out is as OpenCLIP's defaults have it.

    Source: open_clip/transform.py, `PreprocessCfg` and `image_transform`.
    """
    mode = (given or {}).get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ModelError(
            f"its images are resized in the mode {mode!r:.60}, which declip does not support",
            remedy="use a model with the mode shortest or squash",
        )
    expected = given is not None
    known = given or {}
    mean, std = known.get("mean") or OPENAI_MEAN, known.get("std") or OPENAI_STD
    filter_ = known.get("interpolation") or "bicubic"
    words = "pixels are normalized with OpenAI's mean and deviation"
    pixels = {
        "mean": assumptions.take("mean", mean if expected else None, OPENAI_MEAN, words=words),
        "std": assumptions.given.get("std", std),
        "interpolation": assumptions.take(
            "interpolation",
            filter_ if expected else None,
            "bicubic",
            words="images are resized with the bicubic filter",
        ),
        "resize_mode": mode,
    }
    if pixels["interpolation"] == "random":  # OpenCLIP then takes this one
        pixels["interpolation"] = "bicubic"
    return pixels


def _check_same(expected: Architecture, found: Architecture) -> None:
    """Refuse weights that are not those of the configuration beside them."""

    def rounded(one: Architecture) -> Architecture:
        """Write the ratios of hidden layers as their widths have it, whatever their last digits."""
        vision = one.vision
        if isinstance(vision, VitDims):
            vision = replace(vision, mlp_ratio=vision.mlp_width)
        return replace(one, vision=vision, text=replace(one.text, mlp_ratio=one.text.mlp_width))

    expected, found = rounded(expected), rounded(found)
    for part in ("image_side_px", "embed_dim", "vision", "text"):
        one, another = getattr(expected, part), getattr(found, part)
        if one != another:
            raise ModelError(f"its configuration says {one}, its weights say {another}", remedy=DAMAGED)
