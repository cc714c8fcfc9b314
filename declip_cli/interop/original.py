"""Checkpoints of the original DeCLIP code: their parameter names and vocabulary ⇄ ours."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import ForeignModel, translated
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.preprocessing import IMAGE_MEAN, IMAGE_STD
from declip_cli.model.shapes import Untraced

_MASK_ROW = 49406
"""The original's vocabulary puts the mask token before start and end; ours puts it after them."""
_UNUSED: tuple[str, ...] = ("visual.fc.", "predictor_sim.bn3.", "projector_text.", "predictor_text.")
_UNUSED += ("projector_nn_text.", "predictor_nn_text.")
_RENAMED = {
    "encode_text.": "encoder.text.",
    "text_encoder.": "encoder.text.",
    "visual.": "encoder.visual.",
    "image_mapping.": "encoder.token_wise.image_mapping.",
    "text_mapping.": "encoder.token_wise.text_mapping.",
    "text_label_predictor.": "mlm_head.",
    "predictor_sim.": "simclr_head.",
}


def rename_original(name: str) -> str:
    """Translate a parameter name of the original DeCLIP code.

    Args:
        name: such as `module.encode_text.ln_final.weight`.

    Returns:
        The name in a method's state dict; empty for parameters the original allocates but never uses.

    Source: Sense-GVT/DeCLIP, prototype/model/*.py.
    """
    name = name.removeprefix("module.")
    if name.startswith(_UNUSED):
        return ""
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return "encoder.logit_scale" if name == "logit_scale" else name


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the original DeCLIP code into a method's.

    Args:
        state: parameters by name, with or without the prefix `module.`.

    Returns:
        Parameters of the method, with the vocabulary in our order.
    """
    ours = {}
    for name, value in state.items():
        new_name = rename_original(name)
        if not new_name:
            continue
        if new_name in ("encoder.text.token_embedding.weight", "mlm_head.weight", "mlm_head.bias"):
            value = _move_mask_row_last(value)
        if new_name == "encoder.logit_scale":
            value = value.reshape(())
        ours[new_name] = value
    return ours


def _move_mask_row_last(rows: Tensor) -> Tensor:
    before, mask, after = rows.split([_MASK_ROW, 1, len(rows) - _MASK_ROW - 1])
    return torch.cat([before, after, mask])


def original_ids(ids: Tensor) -> Tensor:
    """Translate token ids of the original's vocabulary into ours; -100 and ordinary ids stay.

    Args:
        ids: int64, any shape.

    Returns:
        Our ids, same shape.
    """
    moved = torch.where(ids > _MASK_ROW, ids - 1, ids)
    return torch.where(ids == _MASK_ROW, ids.new_tensor(49408), moved)


def method_of(state: Mapping[str, Tensor]) -> str:
    """Tell which of the five methods trained a checkpoint, by its heads."""
    names = {name.split(".")[0] for name in state}
    if "image_mapping" in names:
        return "defilip" if "projector" in names else "filip"
    if "projector" in names:
        return "declip"
    return "slip" if {"text_encoder", "predictor_sim"} & names else "clip"


def read_original(checkpoint: Checkpoint, assumptions: Assumptions) -> ForeignModel:
    """Translate a checkpoint of one of the five methods.

    Heads are 64 wide, the activation is QuickGELU, and images are resized to 256 px for the 224 px in their middle.

    Source: Sense-GVT/DeCLIP, prototype/model/*.py; ONECROP, prototype/data/imagenet_dataloader.py.
    """
    ours = from_original(checkpoint.state)
    ours = {name.removeprefix("encoder."): v for name, v in ours.items() if name.startswith("encoder.")}
    given = assumptions.given
    quick_gelu = given.get("activation", True)
    untraced = Untraced(
        vision_heads=given.get("heads"),
        text_heads=given.get("text_heads"),
        vision_quick_gelu=quick_gelu,
        text_quick_gelu=quick_gelu,
    )
    pixels: dict[str, Any] = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bilinear"}
    side = _image_side_px(ours)
    if side >= 128:
        pixels |= {"resize_px": round(side * 256 / 224)}
    method = method_of(checkpoint.state)
    return translated(
        checkpoint, ours, untraced, project="original", method=method, pixels=pixels, assumptions=assumptions
    )


def _image_side_px(state: Mapping[str, Tensor]) -> int:
    if "visual.positional_embedding" in state:
        num_patches = len(state["visual.positional_embedding"]) - 1
        return state["visual.conv1.weight"].shape[-1] * round(math.sqrt(num_patches))
    return 32 * round(math.sqrt(len(state["visual.attnpool.positional_embedding"]) - 1))
