import importlib
import itertools
import math
from pathlib import Path

import pytest

from declip_cli.assets import asset_path
from declip_cli.config import RunConfig
from declip_cli.config_files import build_config, list_recipes, load_recipe
from declip_cli.errors import ConfigError
from declip_cli.methods.registry import METHODS
from declip_cli.model.architectures import find_architecture
from declip_cli.resolve import resolve_run
from declip_cli.train.optim import schedule_of
from declip_cli.train.run import propose_recipe
from tests.train.small_runs import resolved

FOUR = {"clip": 0.4, "nn": 0.2, "simsiam": 0.2, "mlm": 0.2}
SIX = FOUR | {"clip": 0.6}

# The eleven configurations of the original: arch, embed_dim, optimizer, first and peak rate, warm-up, steps, pairs per
# process, weight decay, image views, loss weights.
RECIPES = {
    "clip-yfcc15m-rn50": ("rn50", 1024, "adamw", 1e-4, 1e-3, 2500, 128001, 128, 0.1, "p", {"clip": 1}),
    "clip-yfcc15m-vit-b32": ("vit-b32", 512, "adamw", 1e-4, 1e-3, 2500, 128001, 128, 0.1, "p", {"clip": 1}),
    "declip-yfcc15m-rn50": ("rn50", 1024, "adamw", 1e-4, 1e-3, 2500, 128001, 128, 0.1, "aa", FOUR),
    "declip-yfcc15m-vit-b32": ("vit-b32", 512, "adamw", 1e-4, 1e-3, 2500, 128001, 128, 0.1, "aa", FOUR),
    "defilip-yfcc15m-vit-b32": (
        *("vit-b32", 512, "adamw", 1e-4, 1e-3, 2500, 128001, 128, 0.1, "aa"),
        FOUR | {"filip": 0.2},
    ),
    "filip-yfcc15m-rn50": (
        *("rn50", 1024, "adamw", 1e-4, 5e-4, 2500, 128001, 128, 0.5, "a"),
        {"filip": 1, "clip": 0},
    ),
    "filip-yfcc15m-vit-b32": (
        *("vit-b32", 768, "adamw", 1e-4, 5e-4, 2500, 128001, 128, 0.5, "a"),
        {"filip": 1, "clip": 0},
    ),
    "slip-yfcc15m-rn50": (
        *("rn50", 1024, "adamw", 1e-4, 5e-4, 2500, 128001, 128, 0.5, "paa"),
        {"clip": 1, "simclr": 1},
    ),
    "slip-yfcc15m-vit-b32": (
        *("vit-b32", 512, "adamw", 1e-4, 5e-4, 2500, 128001, 128, 0.5, "paa"),
        {"clip": 1, "simclr": 1},
    ),
    "declip-88m-rn50": ("rn50", 1024, "sgd", 1e-3, 0.2, 2500, 46001, 128, 1e-4, "aa", FOUR),
    "declip-88m-vit-b32": ("vit-b32", 3072, "sgd", 1e-3, 0.2, 5000, 300001, 64, 0.0, "aa", SIX),
}
# Zero-shot top-1 on ImageNet, README of the original.
PUBLISHED = {
    "clip-yfcc15m-vit-b32": 32.8,
    "clip-yfcc15m-rn50": 37.2,
    "declip-yfcc15m-vit-b32": 43.2,
    "declip-yfcc15m-rn50": 44.4,
    "slip-yfcc15m-vit-b32": 34.3,
    "slip-yfcc15m-rn50": 28.5,
    "filip-yfcc15m-vit-b32": 39.5,
    "filip-yfcc15m-rn50": 21.3,
    "defilip-yfcc15m-vit-b32": 45.0,
    "declip-88m-rn50": 62.5,
    "declip-88m-vit-b32": 66.2,
}


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module("data_efficiency_rows")


def config_of(name):
    return build_config(RunConfig, load_recipe(name))


def run_of(name):
    return resolved(config_of(name), num_pairs=15_388_848, world_size=32)


def rate(name, step):
    run = run_of(name)
    return schedule_of(run).learning_rate(step * run.global_batch)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_row_of_the_table(name):
    arch, embed_dim, optimizer, start, peak, warmup, steps, batch, decay, views, weights = RECIPES[name]
    config = config_of(name)
    optim, train = config.optim, config.train
    assert (config.model.arch, find_architecture(config.model).embed_dim) == (arch, embed_dim)
    assert (optim.optimizer, optim.learning_rate_start, optim.learning_rate_peak) == (optimizer, start, peak)
    assert (optim.learning_rate_end, optim.warmup_steps, optim.weight_decay) == (0.0, warmup, decay)
    assert (train.steps, train.batch_size, train.ema_decay, train.freeze) == (steps, batch, None, ())
    assert config.method.name == name.split("-")[0]
    assert config.method.weights == weights
    assert (config.method.faithful, config.method.label_smoothing, config.method.pairs) == (True, 0.0, 4)
    text = find_architecture(config.model).text
    assert (text.quick_gelu, text.context_length) == (True, 77)
    assert set(weights) == set(METHODS[config.method.name].default_weights)


@pytest.mark.parametrize("name", RECIPES)
def test_the_views_of_a_recipe_are_those_of_the_original(name):
    views = RECIPES[name][9]
    config = config_of(name)
    method = object.__new__(METHODS[config.method.name])
    method.__dict__.update(config=config.method, weights=config.method.weights)
    assert "".join(kind[0] for kind in method.views.images) == views
    augment = config.augment
    assert (augment.plain_crop_area_min, augment.crop_area_min) == (0.5, 0.2)
    assert (augment.jitter_probability, augment.grayscale_probability) == (0.8, 0.2)
    assert (augment.blur_probability, augment.flip_probability) == (0.5, 0.5)
    assert (augment.mask_probability, augment.deletion_probability) == (0.15, 0.1)


@pytest.mark.parametrize("name", [name for name in RECIPES if "yfcc15m" in name])
def test_the_yfcc_recipes_use_adamw_and_see_4096_pairs_a_step(name):
    config = config_of(name)
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.epsilon) == (0.9, 0.98, 1e-8)
    assert config.train.batch_size * 32 == 4096
    assert config.train.steps * 4096 / 15_388_848 == pytest.approx(34, abs=0.1)
    run = run_of(name)
    settled = run.config
    assert (settled.train.logit_scale_min, settled.train.logit_scale_max) == (3.0, 6.0)
    assert (settled.optim.gradient_clip_norm, settled.optim.decayed) == (math.inf, "original")
    assert (run.global_batch, run.total_steps()) == (4096, 128_001)
    assert config.train.precision == "fp32"


@pytest.mark.parametrize(("name", "logit_scale_rate"), [("declip-88m-rn50", 1e-4), ("declip-88m-vit-b32", 0.0)])
def test_the_88m_recipes_use_sgd_and_bound_the_logit_scale_below_only(name, logit_scale_rate):
    config = config_of(name)
    assert config.optim.momentum == 0.9
    # The original's scheduler multiplies the rate of every group by rate / base rate.
    assert config.optim.logit_scale_learning_rate == pytest.approx(logit_scale_rate * 0.2 / 1e-3)
    settled = run_of(name).config.train
    assert settled.logit_scale_min == 3.0
    assert math.exp(settled.logit_scale_max) > 1e38


@pytest.mark.parametrize(("step", "expected"), [(1, 1e-4), (1250, 5.498e-4), (2500, 1e-3), (64_000, 5.157e-4)])
def test_the_rates_of_the_declip_recipe_are_those_of_the_original(step, expected):
    assert rate("declip-yfcc15m-vit-b32", step) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(name):
    _, _, _, start, peak, warmup, steps, *_ = RECIPES[name]
    assert rate(name, 1) == pytest.approx(start)
    assert rate(name, warmup) == pytest.approx(peak)
    assert rate(name, (warmup + steps) // 2) == pytest.approx(peak / 2, rel=1e-3)
    assert rate(name, steps) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_names_paper_cost_and_published_result(name):
    lines = asset_path(f"recipes/{name}.toml").read_text(encoding="utf-8").splitlines()
    notes = dict(line.lstrip("# ").split(": ", 1) for line in itertools.takewhile(lambda x: x[:1] == "#", lines[1:]))
    assert {"paper", "cost", "result"} <= set(notes)
    assert "arXiv" in notes["paper"]
    assert notes["result"].startswith(f"{PUBLISHED[name]} % zero-shot top-1 on ImageNet")
    assert f"{RECIPES[name][6]:,} steps" in notes["cost"]


def test_every_recipe_can_be_built_and_has_a_title():
    recipes = list_recipes()
    assert list(recipes) == sorted({*RECIPES, "declip-demo", "fine-tune", "small"})
    for name, title in recipes.items():
        assert title
        build_config(RunConfig, load_recipe(name))


def test_an_unknown_recipe_names_close_ones():
    with pytest.raises(ConfigError, match="unknown recipe 'declip-yfcc15-vit'") as caught:
        load_recipe("declip-yfcc15-vit")
    assert "declip-yfcc15m-vit-b32" in caught.value.remedy
    with pytest.raises(ConfigError, match="unknown recipe") as caught:
        load_recipe("../recipes/declip-demo")
    assert "--list-recipes" in caught.value.remedy


def test_fine_tuning_keeps_the_losses_of_clip_and_averages_the_weights():
    config = config_of("fine-tune")
    assert (config.model.arch, config.method.name, config.train.ema_decay) == ("init", "clip", 0.99)
    assert config.optim.learning_rate_peak == 1e-5
    assert config.optim.layer_decay < 1


def test_fine_tuning_takes_the_architecture_of_the_model_that_it_starts_from():
    asked, notes = resolve_run("fine-tune", None, {"train": {"init": "MODEL"}}, [])
    assert (asked.model.arch, asked.train.init, notes) == ("init", "MODEL", [])


def test_the_small_recipe_has_the_settings_that_were_compared_with_other_methods(comparison):
    asked, notes = resolve_run("small", None, {}, [])
    chosen = comparison.draw("small", comparison.RECIPE_TRIAL, {})
    compared = comparison.CELL | comparison.ROWS["small"] | chosen
    for name, value in compared.items():
        section, _, key = name.partition(".")
        if section in ("method", "augment") and key != "queue_size":
            assert getattr(getattr(asked, section), key) == value, name
    assert (asked.optim.learning_rate_peak, notes) == (compared["optim.learning_rate_peak"], [])


@pytest.mark.parametrize(
    ("num_pairs", "is_proposed"), [(4_999, False), (5_000, True), (500_000, True), (500_001, False)]
)
def test_the_small_recipe_is_proposed_for_few_pairs(num_pairs, is_proposed):
    assert (propose_recipe(RunConfig(), num_pairs) is not None) == is_proposed


@pytest.mark.parametrize("settings", [{"method": {"name": "clip"}}, {"method": {"pairs": 2}}, {"train": {"init": "M"}}])
def test_no_recipe_is_proposed_to_those_who_chose_something(settings):
    assert propose_recipe(build_config(RunConfig, settings), 6_000) is None
