"""Checkpoints of facebookresearch/SLIP: a vision transformer of timm's beside CLIP's text tower."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import DAMAGED, ForeignModel, translated, with_mask_token
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.preprocessing import IMAGE_MEAN, IMAGE_STD
from declip_cli.model.shapes import Untraced

_EPS = 1e-6
"""Of timm's layer norms."""
_HEADS = {384: 12, 768: 12, 1024: 16}
"""By the width of the image tower: ViT-S as MoCo v3 has it (timm's own has 6 heads), ViT-B, ViT-L."""
_TEXT_HEADS = 8
_IN_BLOCKS = {
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
_BLOCK = re.compile(r"visual\.blocks\.(\d+\..*)")


def read_slip(checkpoint: Checkpoint, assumptions: Assumptions) -> ForeignModel:
    """Translate a model that the SLIP code has trained with its method CLIP or SLIP.

    The image tower has the exact GELU and no layer norm before its blocks, the text tower has QuickGELU.

    Raises:
        ModelError: it has no text tower (SimCLR), or parts are missing.

    Source: facebookresearch/SLIP, models.py (CLIP, SLIP, vit_*_mocov3_patch16_224), main.py (val_transform).
    """
    theirs = checkpoint.state
    if "token_embedding.weight" not in theirs:
        raise ModelError(
            "it is a SimCLR model of the SLIP code, an image tower without a text tower",
            remedy="use one of its CLIP or SLIP models",
        )
    state = _translate(theirs)
    width = len(state["visual.class_embedding"])
    words = f"attention heads of its image tower, {width} wide, are 64 wide"
    untraced = Untraced(
        vision_heads=assumptions.take("heads", _HEADS.get(width), max(1, width // 64), words=words),
        text_heads=assumptions.given.get("text_heads", _TEXT_HEADS),
        vision_quick_gelu=assumptions.given.get("activation", False),
        text_quick_gelu=True,
        vision_norm_eps=_EPS,
    )
    method = "slip" if any(name.startswith("image_mlp.") for name in theirs) else "clip"
    pixels = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bilinear"}
    return translated(
        checkpoint, state, untraced, project="slip", method=method, pixels=pixels, assumptions=assumptions
    )


def _translate(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Any] = {}
    for name, value in theirs.items():
        block = _BLOCK.fullmatch(name)
        if block is not None:
            new = f"visual.transformer.resblocks.{block[1]}"
            for part, its in _IN_BLOCKS.items():
                new = new.replace(part, its)
            ours[new] = value
        elif name.startswith(("transformer.", "ln_final.")) or name == "positional_embedding":
            ours[f"text.{name}"] = value
    try:
        ours["visual.ln_post.weight"], ours["visual.ln_post.bias"] = (
            theirs["visual.norm.weight"],
            theirs["visual.norm.bias"],
        )
        ours["visual.conv1.weight"] = theirs["visual.patch_embed.proj.weight"]
        ours["visual.class_embedding"] = theirs["visual.cls_token"].flatten()
        positions = theirs["visual.pos_embed"][0]  # (1 + P, E)
        # The bias of the patches' convolution is added to every patch, and so are their positions.
        patches = positions[1:] + theirs["visual.patch_embed.proj.bias"]
        ours["visual.positional_embedding"] = torch.cat([positions[:1], patches])
        ours["visual.proj"] = theirs["image_projection"]
        ours["text.text_projection.weight"] = theirs["text_projection"].T.contiguous()
        ours["text.text_projection.bias"] = theirs["text_projection"].new_zeros(theirs["text_projection"].shape[1])
        ours["text.token_embedding.weight"] = with_mask_token(theirs["token_embedding.weight"])
        ours["logit_scale"] = theirs["logit_scale"].reshape(())
    except (KeyError, RuntimeError, IndexError) as error:
        raise ModelError(f"it is not a complete model of the SLIP code: {error}", remedy=DAMAGED) from error
    return ours
