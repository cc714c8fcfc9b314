"""What is measured against the faster ways computes the same."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from declip_cli.methods import base, declip, rocket
from declip_cli.model import resnet, transformer, vision_transformer
from declip_cli.model.resnet import ModifiedResNet
from declip_cli.train import grad_cache
from tests.methods.small_methods import batch_of, build

PLACES = [
    (transformer.LayerNorm, "forward"),
    (transformer.Mlp, "forward"),
    (transformer.ResidualAttentionBlock, "forward"),
    (vision_transformer.VisionTransformer, "_embed_patches"),
    (resnet, "normalize_images"),
    (base, "contrastive_loss"),
    (declip, "contrastive_loss"),
    (rocket, "contrastive_loss"),
    (grad_cache, "_FIRST_PASS_PARTS"),
]


@pytest.fixture
def old_ways(monkeypatch):
    for owner, name in PLACES:  # is put back afterwards
        monkeypatch.setattr(owner, name, getattr(owner, name))
    spec = importlib.util.spec_from_file_location("old_ways", Path(__file__).with_name("old_ways.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OLD_WAYS


def gradients():
    method = build("declip", queue_start="random", label_smoothing=0.1)
    torch.manual_seed(1)
    method.queue.fill_randomly()
    result = grad_cache.forward_backward(method, batch_of(method, 6), micro_batch_size=1, autocast=nullcontext)
    return {"total": result.terms.total} | {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["layer-norm", "pixels", "quick-gelu", "one-product", "first-pass"])
def test_an_old_way_computes_the_same_step(old_ways, name):
    new = gradients()
    old_ways[name]()
    old = gradients()
    assert new.keys() == old.keys()
    for key, value in new.items():
        assert torch.allclose(value, old[key], rtol=1e-4, atol=1e-5), key


def test_a_resnet_on_contiguous_images_computes_the_same(old_ways):
    torch.manual_seed(0)
    tower = ModifiedResNet(image_side_px=32, num_blocks=(1, 1, 1, 1), width=8, num_heads=2, embed_dim=4).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    new = tower(images, mean, std).features
    old_ways["channels-last"]()
    assert torch.allclose(new, tower(images, mean, std).features, atol=1e-5)
