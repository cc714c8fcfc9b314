import math

import pytest
import torch
from torch import nn

from declip_cli.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from declip_cli.methods.registry import build_method
from declip_cli.train.optim import (
    Schedule,
    build_optimizers,
    clamp_logit_scales,
    clip_gradients,
    layer_factor,
    set_learning_rates,
    step_where,
)
from tests.train.small_runs import resolved

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


def steps_schedule(*, batch=1, **options):
    """Lay a schedule out in steps of some pairs, as the original counts."""
    start, peak, end, warmup, total = (options.pop(k) for k in ("start", "peak", "end", "warmup_steps", "total_steps"))
    schedule = Schedule(
        start=start, peak=peak, end=end, first=batch, warmup=warmup * batch, total=total * batch, **options
    )
    return lambda step, time_share=0.0: schedule.learning_rate(step * batch, time_share)


# Values of the original's Cosine scheduler in its YFCC15M recipe, as recorded.
@pytest.mark.parametrize("batch", [1, 4096])
@pytest.mark.parametrize(("step", "expected"), [(1, 1e-4), (1250, 5.498e-4), (2500, 1e-3)])
def test_the_rate_is_that_of_the_original_while_warming_up(step, expected, batch):
    assert steps_schedule(batch=batch, **YFCC)(step) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("batch", [1, 4096])
def test_the_rate_is_that_of_the_original_in_the_middle(batch):
    # Half a cosine from step 2,500 to 128,001; recorded as 5.157e-4.
    learning_rate = steps_schedule(batch=batch, **YFCC)(64_000)
    assert learning_rate == pytest.approx(5e-4 * (1 + math.cos(math.pi * 61_500 / 125_501)), rel=1e-9)
    assert learning_rate == pytest.approx(5.157e-4, abs=1e-7)


def test_the_bias_of_the_sigmoid_loss_cannot_outweigh_every_cosine():
    method = torch.nn.Module()
    method.logit_scale, method.logit_bias = (torch.nn.Parameter(torch.tensor(start)) for start in (2.0, -500.0))
    clamp_logit_scales(method, (0.0, 4.0))
    assert (method.logit_scale.item(), method.logit_bias.item()) == (2.0, pytest.approx(-math.exp(4.0)))


def test_the_rate_ends_where_it_is_told_to():
    learning_rate = steps_schedule(start=0.1, peak=1.0, end=0.25, warmup_steps=10, total_steps=40)
    assert [learning_rate(40), learning_rate(25), learning_rate(99)] == pytest.approx([0.25, 0.625, 0.25])


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_without_warm_up_starts_at_the_peak(warmup_steps):
    learning_rate = steps_schedule(start=0.0, peak=1.0, end=0.0, warmup_steps=warmup_steps, total_steps=1000)
    assert learning_rate(1) == pytest.approx(1.0, abs=1e-5)


def test_the_rate_is_a_function_of_the_pairs_seen_whatever_the_batch():
    schedule = Schedule(start=0.1, peak=1.0, end=0.0, first=16, warmup=160, total=1600)
    # Seen with steps of 16, of 32 and of 8: the same pairs, the same rate.
    assert schedule.learning_rate(96, 0.0) == pytest.approx(0.1 + 0.9 * 80 / 144)
    assert schedule.learning_rate(8, 0.0) == pytest.approx(0.1)  # a first step smaller than the one it was laid out for
    assert schedule.learning_rate(880, 0.0) == pytest.approx(0.5)
    assert schedule.learning_rate(1610, 0.0) == 0.0


def test_a_time_limit_ends_the_schedule_and_warm_up_takes_a_tenth_of_it():
    # 125,000 steps are planned and 5,400 fit: 1.5 a second for an hour.
    learning_rate = steps_schedule(start=0.0, peak=1.0, end=0.0, warmup_steps=2500, total_steps=125_000)
    found = {step: learning_rate(step, step / 5400) for step in (54, 270, 540, 2970, 5400)}
    assert found[54] == pytest.approx(0.1, abs=0.01)  # a hundredth of the time is a tenth of the warm-up
    assert found[270] == pytest.approx(0.5, abs=0.01)
    assert found[540] == pytest.approx(1.0, abs=0.01)
    assert found[2970] == pytest.approx(0.5, abs=0.01)
    assert found[5400] == pytest.approx(0.0, abs=1e-6)


def test_a_warm_up_that_was_asked_for_is_run_in_full_whatever_the_time_limit():
    options = {"start": 0.0, "peak": 1.0, "end": 0.0, "warmup_steps": 2500, "total_steps": 125_000}
    learning_rate = steps_schedule(**options, is_warmup_asked=True)
    assert learning_rate(540, 540 / 5400) == pytest.approx(539 / 2499)
    assert learning_rate(2500, 2500 / 5400) == pytest.approx(1.0, abs=1e-3)  # no jump where it ends
    assert learning_rate(2600, 2600 / 5400) == pytest.approx(1.0, abs=0.01)
    assert learning_rate(5400, 1.0) == pytest.approx(0.0, abs=1e-6)


def test_a_fast_run_follows_its_pairs_and_not_the_clock():
    learning_rate = steps_schedule(**YFCC)
    for step in (1, 1250, 2500, 64_000, 128_001):
        assert learning_rate(step, step / 1e6) == pytest.approx(learning_rate(step), abs=1e-7)


def settled_config(**sections):
    return resolved(RunConfig(**sections)).config


def undecayed(method, config):
    groups = [g for o in build_optimizers(method, config) for g in o.param_groups if g["weight_decay"] == 0]
    ids = {id(p) for group in groups for p in group["params"]}
    return {name for name, parameter in method.named_parameters() if id(parameter) in ids}


def test_by_default_everything_with_less_than_two_dimensions_is_not_decayed(method, resnet):
    for each in (method, resnet):
        assert undecayed(each, settled_config()) == {n for n, p in each.named_parameters() if p.dim() < 2}


def test_the_faithful_mode_decays_attention_biases_and_the_class_embedding(method):
    faithful = settled_config(method=MethodConfig(name="filip", faithful=True))
    names = {name for name, _ in method.named_parameters()}
    decayed = names - undecayed(method, faithful)
    expected = {n for n in names if n.endswith(("in_proj_bias", "in_proj_weight", "positional_embedding"))}
    expected |= {"encoder.visual.class_embedding", "encoder.visual.proj", "encoder.text.token_embedding.weight"}
    norms = (".ln_1.", ".ln_2.", ".ln_pre.", ".ln_post.", ".ln_final.")
    expected |= {n for n in names if n.endswith(".weight") and not any(norm in n for norm in norms)}
    assert decayed == expected
    assert {n for n in names if "logit_scale" in n} == {"encoder.logit_scale", "logit_scale_dense"}


def test_the_faithful_mode_does_not_decay_batch_norms(resnet):
    faithful = settled_config(method=MethodConfig(name="clip", faithful=True))
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
        optimizers = build_optimizers(method, settled_config(optim=optim))
        found = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in method.parameters() if p.requires_grad}


def test_the_optimizer_has_the_settings_of_the_configuration(method):
    (adamw,) = build_optimizers(method, settled_config(optim=OptimConfig(beta1=0.8, beta2=0.9, epsilon=1e-6)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.8, 0.9), 1e-6)
    (sgd,) = build_optimizers(
        method, settled_config(optim=OptimConfig(optimizer="sgd", momentum=0.7, learning_rate_peak=0.1))
    )
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)


def test_the_text_tower_can_have_an_optimizer_of_its_own(method):
    # The paper's ViT: AdamW 1e-3, decay .05, for the image tower; SGD .02, decay 1e-4, for the text tower.
    optim = OptimConfig(
        learning_rate_peak=1e-3,
        weight_decay=0.05,
        text_optimizer="sgd",
        text_learning_rate_peak=0.02,
        text_weight_decay=1e-4,
    )
    optimizers = build_optimizers(method, settled_config(optim=optim))
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
    frozen = build_optimizers(method, settled_config(optim=OptimConfig(logit_scale_learning_rate=0.0)))
    assert group_of(method, frozen, "encoder.logit_scale") is None
    assert group_of(method, frozen, "logit_scale_dense") is None
    own = build_optimizers(
        method, settled_config(optim=OptimConfig(learning_rate_peak=1e-3, logit_scale_learning_rate=1e-5))
    )
    set_learning_rates(own, 1e-3)
    assert group_of(method, own, "encoder.logit_scale")[1]["lr"] == pytest.approx(1e-5)
    assert group_of(method, own, "encoder.visual.proj")[1]["lr"] == pytest.approx(1e-3)


def test_frozen_parameters_are_left_out():
    other = build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name="clip"))
    other.encoder.visual.requires_grad_(False)
    optimizers = build_optimizers(other, settled_config())
    assert group_of(other, optimizers, "encoder.visual.proj") is None
    assert group_of(other, optimizers, "encoder.text.ln_final.weight") is not None


def test_the_faithful_mode_never_trains_the_patch_embedding():
    other = build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name="clip", faithful=True))
    assert group_of(other, build_optimizers(other, settled_config()), "encoder.visual.conv1.weight") is None


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
    optimizers = build_optimizers(method, settled_config(optim=OptimConfig(layer_decay=0.5)))
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


def test_every_logit_scale_is_pushed_back_into_its_bounds(method):
    with torch.no_grad():
        method.encoder.logit_scale.fill_(7.0)
        method.logit_scale_dense.fill_(-1.0)
    clamp_logit_scales(method, (3.0, 6.0))
    assert (method.encoder.logit_scale.item(), method.logit_scale_dense.item()) == (6.0, 3.0)


def test_gradients_are_scaled_to_the_largest_norm_together():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_gradients([a, b], math.inf).item() == pytest.approx(7.0)
    assert a.grad.tolist() == [2.0, 3.0]
    assert clip_gradients([a, b], 1.4).item() == pytest.approx(7.0)
    assert [*a.grad.tolist(), *b.grad.tolist()] == pytest.approx([0.4, 0.6, 1.2], rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_that_is_not_taken_changes_neither_weights_nor_moments(kind):
    def build():
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        options = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        more = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {}
        return weight, options[kind]([weight], lr=0.1, fused=True, **more)

    def step(weight, optimizer, gradient, is_good):
        weight.grad = torch.tensor(gradient)
        step_where([optimizer], torch.tensor(is_good))

    (one, first), (other, second) = build(), build()
    for gradient in ([1.0, 2.0], [0.5, -1.0]):
        step(one, first, gradient, True)
        step(other, second, gradient, True)
        step(other, second, [float("nan"), float("inf")], False)
    assert torch.equal(one, other)
    for key, value in first.state[one].items():
        assert torch.equal(value, second.state[other][key]), key
