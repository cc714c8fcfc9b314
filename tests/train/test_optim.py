import math

import pytest
import torch
from torch import nn

from declip_cli.config import MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from declip_cli.errors import ConfigError
from declip_cli.methods.registry import build_method
from declip_cli.train.optim import (
    build_optimizers,
    clamp_logit_scales,
    clip_gradients,
    layer_factor,
    learning_rate,
    logit_scale_bounds,
    set_learning_rates,
    warmup_length,
)

YFCC = {"start": 1e-4, "peak": 1e-3, "end": 0.0, "warmup_steps": 2500, "total_steps": 128_001}


@pytest.fixture(scope="module")
def method():
    return build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name="filip"))


@pytest.fixture(scope="module")
def resnet():
    return build_method(ModelConfig(arch="rn-tiny64"), MethodConfig(name="clip"))


def group_of(method, optimizers, name):
    """Find optimizer and group of a named parameter."""
    wanted = dict(method.named_parameters())[name]
    found = [(o, g) for o in optimizers for g in o.param_groups if any(p is wanted for p in g["params"])]
    assert len(found) <= 1
    return found[0] if found else None


# Values of the original's Cosine scheduler in its YFCC15M recipe, as recorded.
@pytest.mark.parametrize(("step", "expected"), [(1, 1e-4), (1250, 5.498e-4), (2500, 1e-3)])
def test_the_rate_is_that_of_the_original_while_warming_up(step, expected):
    assert learning_rate(step, **YFCC) == pytest.approx(expected, abs=5e-8)


def test_the_rate_is_that_of_the_original_in_the_middle():
    # Half a cosine from step 2,500 to 128,001; recorded as 5.157e-4.
    assert learning_rate(64_000, **YFCC) == pytest.approx(5e-4 * (1 + math.cos(math.pi * 61_500 / 125_501)), rel=1e-9)
    assert learning_rate(64_000, **YFCC) == pytest.approx(5.157e-4, abs=1e-7)


def test_the_rate_ends_where_it_is_told_to():
    assert learning_rate(40, start=0.1, peak=1.0, end=0.25, warmup_steps=10, total_steps=40) == pytest.approx(0.25)
    assert learning_rate(25, start=0.1, peak=1.0, end=0.25, warmup_steps=10, total_steps=40) == pytest.approx(0.625)
    assert learning_rate(99, start=0.1, peak=1.0, end=0.25, warmup_steps=10, total_steps=40) == pytest.approx(0.25)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_without_warm_up_starts_at_the_peak(warmup_steps):
    rate = learning_rate(1, start=0.0, peak=1.0, end=0.0, warmup_steps=warmup_steps, total_steps=1000)
    assert rate == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("total", "expected"), [(100_000, 2500), (25_000, 2500), (720, 72), (9, 0), (1, 0)])
def test_the_warm_up_is_2500_steps_or_a_tenth_of_a_short_run(total, expected):
    assert warmup_length(OptimConfig(), total) == expected


def test_a_warm_up_that_does_not_fit_is_an_error_with_both_numbers():
    assert warmup_length(OptimConfig(warmup_steps=399), 400) == 399
    with pytest.raises(
        ConfigError, match=r"optim.warmup_steps must be less than the steps of the run \(got 500, 400\)"
    ) as e:
        warmup_length(OptimConfig(warmup_steps=500), 400)
    assert e.value.remedy == "--set optim.warmup_steps=40"


def undecayed(method, config):
    groups = [g for o in build_optimizers(method, config) for g in o.param_groups if g["weight_decay"] == 0]
    ids = {id(p) for group in groups for p in group["params"]}
    return {name for name, parameter in method.named_parameters() if id(parameter) in ids}


def test_by_default_everything_with_less_than_two_dimensions_is_not_decayed(method, resnet):
    for each in (method, resnet):
        assert undecayed(each, RunConfig()) == {n for n, p in each.named_parameters() if p.dim() < 2}


def test_the_faithful_mode_decays_attention_biases_and_the_class_embedding(method):
    faithful = RunConfig(method=MethodConfig(name="filip", faithful=True))
    names = {name for name, _ in method.named_parameters()}
    decayed = names - undecayed(method, faithful)
    expected = {n for n in names if n.endswith(("in_proj_bias", "in_proj_weight", "positional_embedding"))}
    expected |= {"encoder.visual.class_embedding", "encoder.visual.proj", "encoder.text.token_embedding.weight"}
    norms = (".ln_1.", ".ln_2.", ".ln_pre.", ".ln_post.", ".ln_final.")
    expected |= {n for n in names if n.endswith(".weight") and not any(norm in n for norm in norms)}
    assert decayed == expected
    assert {n for n in names if "logit_scale" in n} == {"encoder.logit_scale", "logit_scale_dense"}


def test_the_faithful_mode_does_not_decay_batch_norms(resnet):
    faithful = RunConfig(method=MethodConfig(name="clip", faithful=True))
    spared = undecayed(resnet, faithful)
    norms = {n for n, m in resnet.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    assert {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")} <= spared
    assert "encoder.visual.layer1.0.conv1.weight" not in spared


def test_every_trained_parameter_is_in_exactly_one_group(method):
    for optim in (
        OptimConfig(),
        OptimConfig(layer_decay=0.5),
        OptimConfig(text_optimizer="sgd", text_weight_decay=0.2),
    ):
        optimizers = build_optimizers(method, RunConfig(optim=optim))
        found = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in method.parameters() if p.requires_grad}


def test_the_optimizer_has_the_settings_of_the_configuration(method):
    (adamw,) = build_optimizers(method, RunConfig(optim=OptimConfig(beta1=0.8, beta2=0.9, epsilon=1e-6)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.8, 0.9), 1e-6)
    (sgd,) = build_optimizers(method, RunConfig(optim=OptimConfig(optimizer="sgd", momentum=0.7)))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)


def test_the_text_tower_can_have_an_optimizer_of_its_own(method):
    # The paper's ViT: AdamW 1e-3, decay .05, for the image tower; SGD .02, decay 1e-4, for the text tower.
    optim = OptimConfig(weight_decay=0.05, text_optimizer="sgd", text_learning_rate_peak=0.02, text_weight_decay=1e-4)
    optimizers = build_optimizers(method, RunConfig(optim=optim))
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, torch.optim.SGD]
    set_learning_rates(optimizers, optim.learning_rate_peak)
    owner, group = group_of(method, optimizers, "encoder.text.token_embedding.weight")
    assert isinstance(owner, torch.optim.SGD)
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.02), 1e-4)
    owner, group = group_of(method, optimizers, "encoder.visual.conv1.weight")
    assert isinstance(owner, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-3), 0.05)
    set_learning_rates(optimizers, 1e-4)  # a tenth of the peak for all
    assert group_of(method, optimizers, "encoder.text.ln_final.weight")[1]["lr"] == pytest.approx(0.002)


def test_the_logit_scales_can_be_frozen_or_have_a_rate_of_their_own(method):
    frozen = build_optimizers(method, RunConfig(optim=OptimConfig(logit_scale_learning_rate=0.0)))
    assert group_of(method, frozen, "encoder.logit_scale") is None
    assert group_of(method, frozen, "logit_scale_dense") is None
    own = build_optimizers(method, RunConfig(optim=OptimConfig(logit_scale_learning_rate=1e-5)))
    set_learning_rates(own, 1e-3)
    assert group_of(method, own, "encoder.logit_scale")[1]["lr"] == pytest.approx(1e-5)
    assert group_of(method, own, "encoder.visual.proj")[1]["lr"] == pytest.approx(1e-3)


def test_frozen_parameters_are_left_out():
    other = build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name="clip"))
    other.encoder.visual.requires_grad_(False)
    optimizers = build_optimizers(other, RunConfig())
    assert group_of(other, optimizers, "encoder.visual.proj") is None
    assert group_of(other, optimizers, "encoder.text.ln_final.weight") is not None


def test_the_faithful_mode_never_trains_the_patch_embedding():
    other = build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name="clip", faithful=True))
    assert group_of(other, build_optimizers(other, RunConfig()), "encoder.visual.conv1.weight") is None


# vit-tiny32 has 4 image blocks and 1 text block; rn-tiny64 has layers 1 to 4.
@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("encoder.visual.proj", 0),
        ("encoder.visual.ln_post.weight", 0),
        ("encoder.logit_scale", 0),
        ("encoder.token_wise.image_mapping.weight", 0),
        ("encoder.visual.transformer.resblocks.3.ln_1.weight", 1),
        ("encoder.visual.transformer.resblocks.0.attn.in_proj_bias", 4),
        ("encoder.visual.ln_pre.weight", 5),
        ("encoder.visual.conv1.weight", 5),
        ("encoder.visual.positional_embedding", 5),
        ("encoder.text.text_projection.bias", 0),
        ("encoder.text.ln_final.weight", 0),
        ("encoder.text.transformer.resblocks.0.mlp.c_fc.weight", 1),
        ("encoder.text.token_embedding.weight", 2),
    ],
)
def test_layer_decay_counts_layers_from_the_output_down(method, name, depth):
    assert layer_factor(name, method, OptimConfig(layer_decay=0.5)) == pytest.approx(0.5**depth)
    assert layer_factor(name, method, OptimConfig()) == 1.0
    optimizers = build_optimizers(method, RunConfig(optim=OptimConfig(layer_decay=0.5)))
    assert group_of(method, optimizers, name)[1]["factor"] == pytest.approx(0.5**depth)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("encoder.visual.attnpool.c_proj.weight", 0),
        ("encoder.visual.attnpool.positional_embedding", 0),
        ("encoder.visual.layer4.0.conv1.weight", 1),
        ("encoder.visual.layer1.0.bn2.bias", 4),
        ("encoder.visual.conv3.weight", 5),
        ("encoder.visual.bn1.weight", 5),
    ],
)
def test_layer_decay_counts_the_stages_of_a_resnet(resnet, name, depth):
    assert layer_factor(name, resnet, OptimConfig(layer_decay=0.5)) == pytest.approx(0.5**depth)


def test_the_bounds_are_ln_1_to_ln_100_and_in_the_faithful_mode_3_to_6():
    assert logit_scale_bounds(RunConfig()) == (0.0, pytest.approx(4.60517, abs=1e-5))
    assert logit_scale_bounds(RunConfig(method=MethodConfig(faithful=True))) == (3.0, 6.0)
    given = RunConfig(train=TrainConfig(logit_scale_min=1.0, logit_scale_max=2.0), method=MethodConfig(faithful=True))
    assert logit_scale_bounds(given) == (1.0, 2.0)
    with pytest.raises(ConfigError, match=r"logit_scale_min must not exceed train\.logit_scale_max \(got 5\.0, 4\.6"):
        logit_scale_bounds(RunConfig(train=TrainConfig(logit_scale_min=5.0)))


def test_every_logit_scale_is_pushed_back_into_its_bounds(method):
    with torch.no_grad():
        method.encoder.logit_scale.fill_(7.0)
        method.logit_scale_dense.fill_(-1.0)
    clamp_logit_scales(method, (3.0, 6.0))
    assert (method.encoder.logit_scale.item(), method.logit_scale_dense.item()) == (6.0, 3.0)


def test_gradients_are_scaled_to_the_largest_norm_together():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_gradients([a, b], 0.0).item() == pytest.approx(7.0)
    assert a.grad.tolist() == [2.0, 3.0]
    assert clip_gradients([a, b], 1.4).item() == pytest.approx(7.0)
    assert [*a.grad.tolist(), *b.grad.tolist()] == pytest.approx([0.4, 0.6, 1.2], rel=1e-4)
