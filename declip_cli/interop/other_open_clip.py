"""Models of OpenCLIP whose towers are not CLIP's own, built by OpenCLIP itself: of timm, CLIPA, CoCa."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import DAMAGED, changed_preprocessing
from declip_cli.interop.other_towers import MAX_CONTEXT_LENGTH, OtherEncoder, OtherTowers, imported
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.preprocessing import read_preprocessing

_OF_CLIP = "positional_embedding"
"""A parameter's name in `CLIP`; `CustomTextCLIP` has `text.` before it."""


def read_other_open_clip(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    pixels: Mapping[str, Any],
    assumptions: Assumptions,
    *,
    reason: str,
) -> OtherTowers:
    """Read a model of OpenCLIP's that our towers cannot be.

    Args:
        checkpoint: its weights.
        config: OpenCLIP's `model_cfg`, from a file that may be damaged.
        pixels: fields of `Preprocessing` but for the sizes.
        assumptions: of these, what concerns the images.
        reason: why our towers cannot be these.

    Raises:
        ModelError: its text tower is Hugging Face's, whose configuration is not in the folder, or it is damaged.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    if text.get("hf_model_name"):
        raise ModelError(
            f"{reason}, and the file does not say which",
            remedy="use a model with a text tower of OpenCLIP's",
        )
    side = vision.get("image_size", 224)
    side = side[0] if isinstance(side, list) and side == side[:1] * 2 else side
    length = text.get("context_length", 77)
    if type(length) is not int or not 3 <= length <= MAX_CONTEXT_LENGTH:
        raise ModelError(f"its context length is {length!r:.60}", remedy=DAMAGED)
    known = read_preprocessing(dict(pixels) | {"image_side_px": side, "resize_px": side}, remedy=DAMAGED)
    return OtherTowers(
        project="open_clip",
        reason=reason,
        make=partial(_make, config),
        state=checkpoint.state,
        config=config,
        embed_dim=config.get("embed_dim"),
        preprocessing=changed_preprocessing(known, assumptions.given),
        context_length=length,
        tokenizer_name=str(text.get("hf_tokenizer_name") or ""),
        tokenizer_options=dict(text.get("tokenizer_kwargs") or {}),
        container=checkpoint.container,
        paths=checkpoint.paths,
        facts=checkpoint.facts,
        assumed=tuple(assumptions.notes),
    )


def _make(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "OpenClipEncoder":
    name = config["vision_cfg"].get("timm_model_name")
    if name and not imported("timm").is_model(name):  # which could be an address, too
        raise ModelError(f"timm has no model {name!r:.60}", remedy="pip install --upgrade timm")
    towers = _build(imported("open_clip"), config)
    towers.load_state_dict(_own_names(towers, state))
    return OpenClipEncoder(towers)


def _build(open_clip: Any, config: Mapping[str, Any]) -> nn.Module:  # noqa: ANN401
    """Make OpenCLIP's module with random weights, as its `create_model` chooses the class."""
    fields = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    if "timm_model_name" in fields["vision_cfg"]:
        fields["vision_cfg"]["timm_model_pretrained"] = False
    if not fields.pop("custom_text", False):
        kind = open_clip.CLIP
    else:
        kind = open_clip.CoCa if "multimodal_cfg" in fields else open_clip.CustomTextCLIP
    towers: nn.Module = kind(**fields)
    return towers


def _own_names(towers: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of earlier releases the names of this one, as OpenCLIP's `load_checkpoint` does."""
    model = importlib.import_module("open_clip.model")
    state = importlib.import_module("open_clip.convert").convert_state_dict(towers, dict(state))
    expected = towers.state_dict()
    if _OF_CLIP in state and _OF_CLIP not in expected:
        state = model.convert_to_custom_text_state_dict(state)
    scalars = ("logit_scale", "logit_bias")
    return {
        name: value.reshape(expected[name].shape) if name in scalars and name in expected else value
        for name, value in state.items()
        if name in expected or name not in scalars
    }


class OpenClipEncoder(OtherEncoder):
    """Encode by OpenCLIP's `CLIP`, `CustomTextCLIP` or `CoCa`."""

    def encode_image(self, images: Tensor, *, projected: bool = True) -> Tensor:
        """Embed images, as in `Encoder`."""
        pixels = self.normalize_images(images)
        if projected:
            features: Tensor = self.towers.encode_image(pixels)
            return features
        return self._unprojected(pixels)

    def _unprojected(self, pixels: Tensor) -> Tensor:
        """Return what the projection is made of: (B, 3, S, S) → (B, E)."""
        visual = self.towers.visual
        if hasattr(visual, "trunk"):  # timm's
            out: Tensor = visual.trunk.forward_head(visual.trunk.forward_features(pixels), pre_logits=True)
            return out.flatten(2).mean(2) if out.ndim == 4 else out
        if getattr(visual, "proj", None) is None:
            raise ModelError("this image tower has no features before its projection", remedy="--features post")
        identity = torch.eye(len(visual.proj), device=pixels.device)  # (E, E)
        found: Any = torch.func.functional_call(visual, {"proj": identity}, (pixels,))
        features: Tensor = found[0] if isinstance(found, tuple) else found
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed texts, as in `Encoder`, whose length is the whole context."""
        features: Tensor = self.towers.encode_text(tokens)
        return features
