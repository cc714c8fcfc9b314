"""Hugging Face's `SiglipModel` folders, built by transformers itself and evaluated only."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import DAMAGED, changed_preprocessing
from declip_cli.interop.hugging_face import read_pixels
from declip_cli.interop.other_towers import MAX_CONTEXT_LENGTH, OtherEncoder, OtherTowers, imported
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.preprocessing import read_preprocessing

_USUAL_PIXELS = {"size": {"height": 224, "width": 224}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_USUAL_TEXT = 64
_SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps"
_OF_TOWER = {
    "vision_config": f"{_SIZES} image_size patch_size num_channels vision_use_head".split(),
    "text_config": f"{_SIZES} vocab_size max_position_embeddings projection_size".split(),
}
"""Fields that say what the towers are; no other reaches transformers."""


def read_siglip(
    checkpoint: Checkpoint, config: Mapping[str, Any], processor: Mapping[str, Any] | None, assumptions: Assumptions
) -> OtherTowers:
    """Read a `SiglipModel`.

    Args:
        checkpoint: its weights.
        config: `config.json`, of the type `siglip`.
        processor: `preprocessor_config.json`; what it leaves out is as `SiglipImageProcessor` has it.
        assumptions: of these, what concerns the images.

    Raises:
        ModelError: it is damaged.

    Source: transformers, models/siglip.
    """
    towers = {}
    for name, fields in _OF_TOWER.items():
        given = config.get(name) or {}
        if not isinstance(given, Mapping):
            raise ModelError(f"its config.json is damaged: no {name}", remedy=DAMAGED)
        towers[name] = {key: given[key] for key in fields if key in given}
    pixels = read_pixels(_USUAL_PIXELS | dict(processor or {}) | {"do_center_crop": False}, assumptions)
    side, length = (
        towers["vision_config"].get("image_size", 224),
        towers["text_config"].get("max_position_embeddings", _USUAL_TEXT),
    )
    if type(length) is not int or not 3 <= length <= MAX_CONTEXT_LENGTH or pixels.pop("crop") != side:
        raise ModelError(
            f"its configurations contradict each other: {length!r:.60} tokens, {side!r:.60} px", remedy=DAMAGED
        )
    known = read_preprocessing(pixels | {"image_side_px": side}, remedy=DAMAGED)
    return OtherTowers(
        project="huggingface",
        reason="it is a SigLIP model, whose towers and vocabulary are not CLIP's",
        make=partial(_make, towers),
        state=checkpoint.state,
        config=towers,
        embed_dim=towers["text_config"].get("projection_size", towers["text_config"].get("hidden_size", 768)),
        preprocessing=changed_preprocessing(known, assumptions.given),
        context_length=length,
        tokenizer_name="siglip",
        container=checkpoint.container,
        paths=checkpoint.paths,
        assumed=tuple(assumptions.notes),
    )


def _make(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "SiglipEncoder":
    transformers = imported("transformers")
    unused = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # by default none of this vocabulary
    text = unused | config["text_config"]
    towers = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=config["vision_config"], text_config=text)
    )
    towers.load_state_dict(state)
    return SiglipEncoder(towers)


class SiglipEncoder(OtherEncoder):
    """Encode by transformers' `SiglipModel`."""

    def encode_image(self, images: Tensor, *, projected: bool = True) -> Tensor:
        """Embed images, as in `Encoder`; the image tower has no projection."""
        return _features(self.towers.get_image_features(pixel_values=self.normalize_images(images)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed texts, as in `Encoder`, whose length is the whole context."""
        return _features(self.towers.get_text_features(input_ids=tokens))


def _features(found: Any) -> Tensor:  # noqa: ANN401
    """Take the features out of what transformers returns: from version 5 on, an object."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features
