"""A model that goes out and comes in again, by way of every format that can hold it, is the same model."""

import dataclasses

import pytest
import torch

from declip_cli.interop.export import export
from declip_cli.interop.model_card import Card
from declip_cli.interop.read import load_model
from declip_cli.interop.sample import demo_sample, embed
from tests.interop.small_models import RESNET, TEXT, VIT, model_of

GELU = {"vision": dataclasses.replace(VIT, quick_gelu=False), "text": dataclasses.replace(TEXT, quick_gelu=False)}
MIXED = {"vision": dataclasses.replace(VIT, quick_gelu=False, norm_eps=1e-6, mlp_ratio=3.0), "text": TEXT}
JOURNEYS = {
    "QuickGELU": ({"interpolation": "bicubic"}, ["openclip", "huggingface", "openclip"]),
    "GELU, squashed": ({**GELU, "resize_mode": "squash"}, ["huggingface", "openclip", "huggingface"]),
    "different activations": (MIXED, ["huggingface", "huggingface"]),
    "a wide embedding": ({"embed_dim": 20}, ["huggingface", "openclip"]),
    "resize, then crop": ({"resize_px": 37}, ["huggingface", "huggingface"]),
    "ResNet": ({"vision": RESNET}, ["openclip", "openclip"]),
}


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_model_survives_the_journey(name, tmp_path):
    words, journey = JOURNEYS[name]
    model, sample = model_of(**words), demo_sample()
    expected, found = embed(model, sample), model
    for number, to in enumerate(journey):
        given = {"crop": "round"} if to == "openclip" and found.preprocessing.crop_at == "floor" else {}
        if given:  # transformers' cut, which OpenCLIP has not
            found = load_model(tmp_path / str(number - 1), given=given)
        export(found, to, tmp_path / str(number), card=Card(name="there"))
        found = load_model(tmp_path / str(number))
    assert found.encoder.architecture == model.encoder.architecture
    how = dataclasses.replace(found.preprocessing, crop_at=model.preprocessing.crop_at)
    assert how == model.preprocessing
    found = dataclasses.replace(found, preprocessing=how)
    assert expected.difference(embed(found, sample)) <= 1e-5
    assert torch.equal(found.encoder.logit_scale, model.encoder.logit_scale)
