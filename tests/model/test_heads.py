import pytest
import torch

from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.methods.registry import build_method
from declip_cli.model.heads import SimClrHead, SimSiamPredictor, SimSiamProjector, TokenWiseHeads


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_projector_of_simsiam_has_three_layers_of_1024():
    projector = SimSiamProjector(10)
    assert projector(torch.randn(6, 10)).shape == (6, 1024)
    # Linear with bias and an affine BatchNorm, three times (Sense-GVT/DeCLIP, prototype/model/declip.py:33-80).
    assert num_parameters(projector) == (10 * 1024 + 1024) + 2 * (1024 * 1024 + 1024) + 3 * 2 * 1024


def test_the_projector_ends_in_a_norm_and_not_in_a_relu():
    out = SimSiamProjector(10)(torch.randn(64, 10))
    torch.testing.assert_close(out.mean(0), torch.zeros(1024), rtol=0, atol=1e-4)
    assert (out < 0).any()


def test_the_predictor_of_simsiam_is_a_bottleneck_of_512():
    predictor = SimSiamPredictor()
    assert predictor(torch.randn(6, 1024)).shape == (6, 1024)
    assert num_parameters(predictor) == (1024 * 512 + 512) + 2 * 512 + (512 * 1024 + 1024)


def test_the_head_of_simclr_has_256_outputs_without_norm():
    head = SimClrHead(10)
    assert head(torch.randn(6, 10)).shape == (6, 256)
    hidden = 4096
    expected = (10 * hidden + hidden) + (hidden * hidden + hidden) + 2 * 2 * hidden + (hidden * 256 + 256)
    assert num_parameters(head) == expected


def test_token_wise_heads_map_patches_and_tokens_into_one_width():
    heads = TokenWiseHeads(10, 7, width=5)
    assert heads.image_mapping(torch.randn(2, 3, 10)).shape == (2, 3, 5)
    assert heads.text_mapping(torch.randn(2, 4, 7)).shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("name", "weights", "heads"),
    [
        ("slip", {}, {"simclr_head.linear2": (48, 48)}),
        ("declip", {}, {"projector.linear3": (48, 48), "predictor.linear1": (24, 48), "predictor.layer2": (48, 24)}),
        ("declip", {"simclr": 0.2}, {"simclr_head.linear3": (256, 48)}),
        ("rocket", {}, {"image_head.linear2": (48, 48), "text_head.linear3": (256, 48)}),
    ],
)
def test_heads_are_as_wide_as_asked_for(name, weights, heads):
    config = MethodConfig(name=name, weights=weights, head_width=48, queue_size=8)
    method = build_method(ModelConfig(arch="vit-tiny32"), config)
    for head, shape in heads.items():
        assert tuple(method.get_submodule(head).weight.shape) == shape
