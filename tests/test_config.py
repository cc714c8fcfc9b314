import dataclasses
import json
import math

import pytest

from declip_cli.config import (
    AugmentConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from declip_cli.config_files import build_config, merge_into, parse_assignments, read_settings, read_toml, to_plain
from declip_cli.errors import ChoiceError, ConfigError


def build(**sections):
    return build_config(RunConfig, sections)


def test_values_land_in_their_sections_and_the_rest_keeps_its_default():
    config = build(train={"steps": 7, "eval": ["demo"]}, optim={"learning_rate_peak": 1})
    assert config.train.steps == 7
    assert config.train.eval == ("demo",)
    assert config.optim.learning_rate_peak == 1.0
    assert isinstance(config.optim.learning_rate_peak, float)
    assert dataclasses.replace(config, train=TrainConfig(), optim=OptimConfig()) == RunConfig()


def test_an_unknown_key_is_an_error_with_the_closest_name():
    with pytest.raises(ConfigError, match="unknown key") as caught:
        build(train={"batchsize": 8})
    assert caught.value.message == "unknown key 'train.batchsize'"
    assert caught.value.remedy.startswith("did you mean 'batch_size'? section [train] has: ")
    assert "warmup" not in caught.value.remedy


def test_an_unknown_section_is_an_error_with_the_closest_name():
    with pytest.raises(ConfigError, match="unknown key 'trian'") as caught:
        build(trian={"steps": 8})
    assert caught.value.remedy.startswith("did you mean 'train'? the configuration has: augment, data, ")


def test_a_key_like_no_other_gets_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        build(model={"zzz": 8})
    assert caught.value.remedy.startswith("section [model] has: ")


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "steps", 1.5, "a whole number"),
        ("train", "steps", "many", "a whole number"),
        ("train", "steps", True, "a whole number"),
        ("train", "compile", 1, "one of auto, true, false"),
        ("train", "compile", "yes", "one of auto, true, false"),
        ("train", "precision", "int8", "one of auto, fp32, bf16, fp16"),
        ("train", "freeze", ["audio"], "one of image, text"),
        ("train", "eval", 3, "a list"),
        ("method", "name", "blip", "one of clip, slip, filip, declip, defilip, rocket, aclip"),
        ("method", "pairs", 3, "one of 1, 2, 4"),
        ("method", "pairs", True, "one of 1, 2, 4"),
        ("augment", "text_operations", ["insert"], "one of synonym, swap, delete"),
        ("method", "weights", 0.4, "a table"),
        ("optim", "weight_decay", "small", "a number"),
        ("optim", "text_optimizer", "lamb", "one of adamw, sgd"),
        ("model", "arch", ["vit-b32"], "text"),
    ],
)
def test_a_wrong_type_names_key_and_kind(section, key, value, expected):
    with pytest.raises(ConfigError) as caught:
        build(**{section: {key: value}})
    assert caught.value.message.startswith(f"{section}.{key} must be {expected} (got ")
    assert caught.value.remedy == f"--set {section}.{key}=…"


def test_a_weight_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match=r"method\.weights\.mlm must be a number \(got 'off'\)"):
        build(method={"weights": {"mlm": "off"}})


def test_a_section_that_is_no_section_is_an_error():
    with pytest.raises(ConfigError, match=r"train must be a section \(got 5\)"):
        build(train=5)


def test_assignments_are_toml_values_or_plain_text():
    words = [
        "train.steps=20",
        "train.ema_decay=0.9",
        "method.faithful=true",
        "method.weights.mlm=0",
        "model.arch=vit-b16",
    ]
    words += ["train.freeze=image", "train.eval=[]", 'data.path=["a", "b=c"]', "train.init=runs/x=1"]
    assert parse_assignments(words) == {
        "train": {"steps": 20, "ema_decay": 0.9, "freeze": "image", "eval": [], "init": "runs/x=1"},
        "method": {"faithful": True, "weights": {"mlm": 0}},
        "model": {"arch": "vit-b16"},
        "data": {"path": ["a", "b=c"]},
    }
    config = build_config(RunConfig, parse_assignments(words))
    assert config.train.freeze == ("image",)
    assert config.method.weights == {"mlm": 0.0}


def test_a_later_assignment_wins():
    assert parse_assignments(["train.steps=1", "train.steps=2"]) == {"train": {"steps": 2}}


@pytest.mark.parametrize("word", ["train.steps", "steps=3", "=3", "train.=3", ".steps=3"])
def test_an_assignment_without_section_or_value_is_an_error(word):
    with pytest.raises(ConfigError, match="--set wants section.key=value") as caught:
        parse_assignments([word])
    assert word in caught.value.message
    assert "--set train.ema_decay" in caught.value.remedy


def test_merging_keeps_what_is_not_overridden():
    settings = {"train": {"steps": 1, "seed": 2}, "model": {"arch": "rn50"}}
    merge_into(settings, {"train": {"steps": 3}, "method": {"weights": {"nn": 1}}})
    assert settings == {"train": {"steps": 3, "seed": 2}, "model": {"arch": "rn50"}, "method": {"weights": {"nn": 1}}}


def full_config():
    return RunConfig(
        model=ModelConfig(arch="rn50", embed_dim=7, quick_gelu=False),
        data=DataConfig(path=("a/", "b-{00..09}.tar")),
        augment=AugmentConfig(text_operations=("swap",), hue=0.0),
        method=MethodConfig(name="slip", weights={"simclr": 0.5}, pairs=2),
        optim=OptimConfig(layer_decay=0.7, gradient_clip_norm=math.inf),
        train=TrainConfig(freeze=("image", "text"), eval=("demo", "folder")),
    )


def test_none_and_infinity_can_be_said_everywhere():
    words = parse_assignments(["optim.gradient_clip_norm=inf", "train.checkpoint_every_minutes=none"])
    config = build_config(RunConfig, words)
    assert (config.optim.gradient_clip_norm, config.train.checkpoint_every_minutes) == (math.inf, None)
    with pytest.raises(ConfigError, match=r"train\.seed must be a whole number \(got 'none'\)"):
        build(train={"seed": "none"})


def test_words_that_look_like_values_are_words_where_words_are_wanted():
    config = build_config(RunConfig, parse_assignments(["data.split=true", "train.init=123"]))
    assert (config.data.split, config.train.init) == ("true", "123")


def test_a_wrong_choice_is_wrong_usage_and_a_wrong_value_is_not():
    with pytest.raises(ChoiceError) as choice:
        build(method={"name": "blip"})
    with pytest.raises(ConfigError) as value:
        build(train={"batch_size": 1})
    assert (choice.value.exit_code, value.value.exit_code) == (2, 1)


def test_the_settings_of_a_run_are_read_from_its_json(tmp_path):
    written = to_plain(full_config())
    written["augment"]["mode"] = "exact"  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps({"config": written, "asked": {}}))
    assert build_config(RunConfig, read_settings(tmp_path / "config.json")) == full_config()
    for damage in ("{", "[1]", '{"config": 3}', "[" * 50_000):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(ConfigError, match="cannot read the settings in"):
            read_settings(tmp_path / "config.json")


def test_json_is_read_back_as_the_same_configuration():
    assert build_config(RunConfig, json.loads(json.dumps(to_plain(full_config())))) == full_config()
    assert build_config(RunConfig, json.loads(json.dumps(to_plain(RunConfig())))) == RunConfig()


def test_a_toml_file_is_read_as_sections(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\narch = "vit-b16"\n[method]\nweights = { nn = 0.0 }\n[train]\neval = ["demo"]\n')
    config = build_config(RunConfig, read_toml(path))
    assert (config.model.arch, config.method.weights, config.train.eval) == ("vit-b16", {"nn": 0.0}, ("demo",))


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*none\.toml: No such file"):
        read_toml(tmp_path / "none.toml")


def test_a_broken_file_is_an_error_that_shows_what_a_line_looks_like(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("train.steps: 3\n")
    with pytest.raises(ConfigError, match="is not valid TOML") as caught:
        read_toml(path)
    assert "batch_size = 256" in caught.value.remedy
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"batch_size": 1}, "--batch-size must be at least 2, a contrastive loss needs negatives (got 1)"),
        (TrainConfig, {"time_limit_s": 0.0}, "train.time_limit_s must be positive (got 0.0)"),
        (TrainConfig, {"epochs": math.inf}, "train.epochs must be positive (got inf)"),
        (OptimConfig, {"learning_rate_peak": math.inf}, "--learning-rate must be positive (got inf)"),
        (TrainConfig, {"steps": -1}, "train.steps must be at least 1 (got -1)"),
        (TrainConfig, {"ema_decay": 1.0}, "train.ema_decay is in [0, 1) (got 1.0)"),
        (OptimConfig, {"learning_rate_peak": 0.0}, "--learning-rate must be positive (got 0.0)"),
        (OptimConfig, {"layer_decay": 0.0}, "optim.layer_decay is in (0, 1] (got 0.0)"),
        (MethodConfig, {"queue_size": 0}, "method.queue_size must be at least 1 (got 0)"),
        (MethodConfig, {"simclr_temperature": 0.0}, "method.simclr_temperature must be positive (got 0.0)"),
        (MethodConfig, {"label_smoothing": 1.5}, "method.label_smoothing is a fraction in [0, 1] (got 1.5)"),
        (AugmentConfig, {"crop_area_min": 20.0}, "augment.crop_area_min is a fraction in [0, 1] (got 20.0)"),
        (AugmentConfig, {"hue": 0.6}, "augment.hue is in [0, 0.5] (got 0.6)"),
        # A few that would otherwise fail, or mislead, far from here.
        (TrainConfig, {"log_every_steps": 0}, "train.log_every_steps must be at least 1 (got 0)"),
        (TrainConfig, {"checkpoint_every_steps": -1}, "train.checkpoint_every_steps must be at least 1 (got -1)"),
        (TrainConfig, {"eval_every_steps": -5}, "train.eval_every_steps must be at least 1 (got -5)"),
        (MethodConfig, {"token_wise_top_k": 0}, "method.token_wise_top_k must be at least 1 (got 0)"),
        (DataConfig, {"max_bad": 5.0}, "data.max_bad is a fraction in [0, 1] (got 5.0)"),
        (DataConfig, {"workers": -2}, "data.workers cannot be negative (got -2)"),
        (
            OptimConfig,
            {"learning_rate_peak": 5e-5, "learning_rate_start": 1e-4},
            "optim.learning_rate_start must not exceed the peak (got 0.0001, 5e-05)",
        ),
        (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay cannot be negative (got -0.1)"),
        (OptimConfig, {"gradient_clip_norm": -1.0}, "optim.gradient_clip_norm must be positive (got -1.0)"),
        (OptimConfig, {"beta2": 1.0}, "optim.beta2 is in [0, 1) (got 1.0)"),
        (
            AugmentConfig,
            {"blur_sigma_min_px": 3.0},
            "augment.blur_sigma_min_px must not exceed blur_sigma_max_px (got 3.0, 2.0)",
        ),
        (MethodConfig, {"weights": {"clip": -0.5}}, "method.weights.clip cannot be negative (got -0.5)"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(kind, values, message):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert caught.value.message == message
    assert caught.value.remedy
