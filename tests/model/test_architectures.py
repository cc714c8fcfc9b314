"""Architectures by name, ours and those of the installed OpenCLIP."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from declip_cli.config import ModelConfig
from declip_cli.errors import ConfigError, DeclipError, ModelError
from declip_cli.model.architectures import find_architecture, name_of, resolve_model
from declip_cli.model.clip import DualEncoder
from declip_cli.model.dims import describe_architecture, read_architecture
from declip_cli.model.open_clip_layout import open_clip_config
from declip_cli.model.open_clip_towers import read_open_clip_model
from declip_cli.model.preprocessing import Preprocessing

FOLDER = Path(open_clip.__file__).parent / "model_configs"
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def is_plain(config):
    """Tell by OpenCLIP's own classes whether both towers are CLIP's, with CLIP's vocabulary."""
    vision, text = open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"])
    is_vision = not vision.timm_model_name and vision.pool_type == "tok" and not vision.attentional_pool
    is_text = not text.hf_model_name and text.vocab_size == 49408 and text.pool_type == "argmax" and not text.embed_cls
    is_text = is_text and not text.hf_tokenizer_name and not text.no_causal_mask and text.proj_type == "linear"
    return is_vision and is_text and vision.ls_init_value is None and "multimodal_cfg" not in config


PLAIN = sorted(name for name, config in CONFIGS.items() if is_plain(config))
OTHER = sorted(set(CONFIGS) - set(PLAIN))


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("attn_mask")}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_of_open_clip_has_its_parameters_here(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        encoder = DualEncoder(find_architecture(ModelConfig(arch=f"open_clip:{name}")))
        theirs = open_clip.CLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    ours = {name.removeprefix("text."): value for name, value in encoder.state_dict().items()}
    words, width = ours.pop("token_embedding.weight").shape
    projection, bias = ours.pop("text_projection.weight"), ours.pop("text_projection.bias")
    expected = shapes(theirs.state_dict())
    assert expected.pop("token_embedding.weight") == (words - 1, width)  # ours has the mask token
    assert expected.pop("text_projection") == tuple(projection.T.shape)
    assert len(bias) == config["embed_dim"]
    assert shapes(ours) == expected


def test_there_are_plain_models_of_every_size():
    assert {"ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "RN50x64", "ViT-S-32-alt"} <= set(PLAIN)


@pytest.mark.parametrize("name", OTHER)
def test_other_models_of_open_clip_are_refused_with_the_reason(name):
    with pytest.raises(ModelError, match=r"not a plain ViT or ResNet of CLIP: (its?|declip) .*_cfg"):
        find_architecture(ModelConfig(arch=f"open_clip:{name}"))


@pytest.mark.parametrize(
    "name", ["vit-b32", "vit-b16", "vit-b16-336", "vit-l14", "vit-l14-336", "rn50", "rn101", "rn50x4"]
)
def test_names_of_ours_are_those_of_open_clip(name):
    peer = {
        "vit-b32": "ViT-B-32-quickgelu",
        "vit-b16": "ViT-B-16-quickgelu",
        "vit-b16-336": "ViT-B-16-quickgelu",
        "vit-l14": "ViT-L-14-quickgelu",
        "vit-l14-336": "ViT-L-14-336-quickgelu",
        "rn50": "RN50-quickgelu",
        "rn101": "RN101-quickgelu",
        "rn50x4": "RN50x4-quickgelu",
    }[name]
    side = 336 if name == "vit-b16-336" else None
    found = find_architecture(ModelConfig(arch=name))
    assert found == find_architecture(ModelConfig(arch=f"open_clip:{peer}", image_side_px=side))
    assert name_of(found) == name.removesuffix("-336")
    how = Preprocessing(image_side_px=found.image_side_px, resize_px=found.image_side_px)
    assert read_open_clip_model(open_clip_config(found, how)["model_cfg"]) == found
    assert read_architecture(json.loads(json.dumps(describe_architecture(found)))) == found


def test_the_activation_is_the_architecture_s_unless_it_is_set():
    for arch, quick_gelu, expected in (
        ("vit-b32", None, True),
        ("vit-b32", False, False),
        ("open_clip:ViT-B-32", None, False),
        ("open_clip:ViT-B-32", True, True),
    ):
        config = ModelConfig(arch=arch, quick_gelu=quick_gelu)
        found = find_architecture(config)
        assert (found.vision.quick_gelu, found.text.quick_gelu, resolve_model(config).quick_gelu) == (expected,) * 3


@pytest.mark.parametrize("name", ["ViT-X-1", "../ViT-B-32", ""])
def test_an_unknown_name_of_open_clip_is_an_error(name):
    with pytest.raises(DeclipError, match="OpenCLIP has no model"):
        find_architecture(ModelConfig(arch=f"open_clip:{name}"))


def test_images_cannot_be_resized_to_less_than_the_image():
    for resize_px, mode in ((200, None), (256, "squash")):
        with pytest.raises(ConfigError, match="model.resize_px must be at least the image's side"):
            find_architecture(ModelConfig(resize_px=resize_px, resize_mode=mode))
    assert resolve_model(ModelConfig()).resize_px == 224
