import dataclasses
import json

import pytest

from declip_cli.config import RunConfig
from declip_cli.config_files import build_config
from declip_cli.errors import ConfigError
from declip_cli.presets import PRESETS
from declip_cli.resolve import DataFacts, Machine, resolve, resolve_run, resolved_from_json
from tests.train.small_runs import resolved

DATA = DataFacts(num_pairs=1000, fingerprint="x")


def machine(world_size=1, precision="fp32"):
    return Machine(world_size=world_size, device="cpu", precision=precision, cores=4, threads=4, workers=1)


def asked(**sections):
    return build_config(RunConfig, sections)


def settle(config, *, world_size=1, **options):
    return resolve(config, data=DATA, machine=machine(world_size), **options)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "expected"), [(4096, 1, 1e-3), (256, 16, 1e-3), (1024, 1, 5e-4), (256, 1, 2.5e-4)]
)
def test_the_peak_rate_follows_the_square_root_of_the_global_batch(batch_size, world_size, expected):
    run = settle(asked(train={"batch_size": batch_size, "steps": 5}), world_size=world_size)
    assert run.config.optim.learning_rate_peak == pytest.approx(expected)
    assert run.config.optim.learning_rate_start == pytest.approx(expected / 10)


def test_a_rate_that_was_asked_for_stays():
    run = settle(asked(train={"steps": 5}, optim={"learning_rate_peak": 3e-3, "learning_rate_start": 0.0}))
    assert (run.config.optim.learning_rate_peak, run.config.optim.learning_rate_start) == (3e-3, 0.0)


def test_sgd_has_no_default_rate():
    with pytest.raises(ConfigError, match="sgd has no default learning rate") as caught:
        settle(asked(train={"steps": 5}, optim={"optimizer": "sgd"}))
    assert caught.value.remedy.startswith("--learning-rate")


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({}, 32 * 31),  # the paper's epochs, of 31 whole batches of 32
        ({"epochs": 2}, 62),
        ({"epochs": 2, "steps": 7}, 7),
        ({"steps": 7, "samples": 320}, 10),
        ({"samples": 330}, 11),
    ],
)
def test_the_length_is_samples_else_steps_else_epochs(train, steps):
    run = settle(asked(train={"batch_size": 32, **train}))
    assert run.total_steps() == steps


@pytest.mark.parametrize(("steps", "expected"), [(100_000, 2500), (25_000, 2500), (720, 72), (9, 0), (1, 0)])
def test_the_warm_up_is_2500_steps_or_a_tenth_of_a_short_run(steps, expected):
    assert settle(asked(train={"steps": steps})).config.optim.warmup_samples == expected * 256


def test_a_warm_up_that_does_not_fit_is_an_error_with_both_numbers():
    assert settle(asked(train={"steps": 400}, optim={"warmup_steps": 399})).config.optim.warmup_samples == 399 * 256
    with pytest.raises(ConfigError, match=r"must be less than the steps of the run \(got 500, 400\)") as caught:
        settle(asked(train={"steps": 400}, optim={"warmup_steps": 500}))
    assert caught.value.remedy == "--set optim.warmup_steps=40"


@pytest.mark.parametrize("is_faithful", [False, True])
def test_every_switch_is_settled_by_the_preset_and_by_nothing_else(is_faithful):
    config = settle(asked(train={"steps": 5}, method={"faithful": is_faithful})).config
    for section, values in PRESETS.items():
        for key, pair in values.items():
            assert getattr(getattr(config, section), key) == pair[is_faithful]
            assert getattr(getattr(RunConfig(), section), key) is None


def test_a_switch_can_be_set_against_the_preset():
    config = settle(asked(train={"steps": 5}, method={"faithful": True, "nn_symmetric": True})).config
    assert (config.method.nn_symmetric, config.method.mlm_mean) == (True, "rank")


def test_bounds_that_cross_are_an_error():
    with pytest.raises(ConfigError, match=r"logit_scale_min must not exceed train\.logit_scale_max \(got 5\.0, 4\.6"):
        settle(asked(train={"steps": 5, "logit_scale_min": 5.0}))


@pytest.mark.parametrize("name", ["clip", "slip", "filip", "declip", "defilip", "rocket", "aclip"])
def test_the_weight_of_every_term_is_written_down(name):
    weights = {
        "clip": {"clip": 1.0},
        "slip": {"clip": 1.0, "simclr": 1.0},
        "filip": {"clip": 0.0, "filip": 1.0},
        "declip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2},
        "defilip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2, "filip": 0.2},
        "rocket": {"clip": 1 / 3, "strong": 2 / 3},
        "aclip": {"clip": 1.0, "simclr": 1.0, "byol": 2.0},
    }[name]
    assert settle(asked(train={"steps": 5}, method={"name": name})).config.method.weights == weights


def test_a_resolved_run_is_read_back_from_json_and_named_by_what_decides_its_result():
    run = resolved()
    text = json.dumps(run.to_json(), allow_nan=False)
    assert resolved_from_json(json.loads(text)) == run
    assert json.loads(text)["run"]["digest"] == run.digest
    machine_only = resolved(dataclasses.replace(run.asked, train=dataclasses.replace(run.asked.train, threads=3)))
    assert machine_only.digest == run.digest
    other = resolved(dataclasses.replace(run.asked, train=dataclasses.replace(run.asked.train, seed=3)))
    assert other.digest != run.digest


def test_sources_override_each_other_in_their_order(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[train]\nseed = 2\nbatch_size = 20\nsteps = 2\nlog_every_steps = 2\n[data]\npath = ["demo"]\n')
    options = {"train": {"seed": None, "steps": 3, "batch_size": 30}}
    config, notes = resolve_run("declip-demo", file, options, ["train.steps=4"])
    train = config.train
    assert (train.log_every_steps, train.seed, train.batch_size, train.steps) == (2, 2, 30, 4)
    assert config.method.label_smoothing == 0.1  # the recipe's
    assert notes == []


@pytest.mark.parametrize(("option", "value"), [("epochs", 3.0), ("steps", 9), ("samples", 512)])
def test_of_epochs_steps_and_samples_the_strongest_source_counts(option, value):
    config, _ = resolve_run(
        "declip-demo", None, {"train": {option: value}} if option != "samples" else {}, [f"train.{option}={value}"]
    )
    given = {key: getattr(config.train, key) for key in ("epochs", "steps", "samples")}
    assert given == dict.fromkeys(given) | {option: value}


def test_a_recipe_s_sizes_are_not_those_of_the_model_that_a_run_starts_from():
    options = {"data": {"path": ["demo"]}, "model": {"arch": "init"}, "train": {"init": "x"}}
    config, _ = resolve_run(None, None, options, ["model.image_side_px=64"])
    assert (config.model.context_length, config.model.image_side_px) == (None, 64)
    assert config.method.label_smoothing == 0.1  # the recipe's


def test_the_demo_brings_its_recipe_to_a_new_run_only():
    options = {"data": {"path": ["demo"]}}
    assert resolve_run(None, None, options, [])[0].model.arch == "vit-tiny32"
    assert resolve_run(None, None, options, [], before=RunConfig())[0].model.arch == "vit-b32"


def go_on(before, changes, **options):
    config, _ = resolve_run(None, None, {}, changes, before=before.asked)
    return resolve(config, data=DATA, machine=machine(options.pop("world_size", 1)), before=before, **options)


def test_the_split_may_still_be_called_part(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text('[data]\npart = "val"\n')
    for given in ({"file": file, "words": []}, {"file": None, "words": ["data.part=val"]}):
        config, notes = resolve_run(None, given["file"], {}, given["words"])
        assert config.data.split == "val"
        assert notes == ["note: data.part is called data.split now"]
    assert resolve_run(None, None, {}, ["data.split=val"])[1] == []


def test_what_was_settled_stays_whatever_defaults_say_later(monkeypatch):
    before = settle(asked(train={"steps": 100}, method={"name": "declip"}))
    monkeypatch.setitem(PRESETS["method"], "nn_symmetric", (False, False))
    monkeypatch.setattr("declip_cli.resolve._PEAK_AT_4096", 7.0)
    after = go_on(before, ["train.log_every_steps=1"])
    assert after.config.method.nn_symmetric is True
    assert after.config.optim.learning_rate_peak == before.config.optim.learning_rate_peak


def test_another_world_keeps_rate_warm_up_end_and_schedule():
    before = settle(asked(train={"steps": 100}))
    after = go_on(before, [], world_size=4, step=40, samples_seen=40 * 256)
    assert (after.global_batch, after.schedule_batch) == (1024, 256)
    assert after.config.optim == before.config.optim
    assert after.config.train.samples == 25_600
    assert after.total_steps(step=40, samples_seen=40 * 256) == 40 + 15


def test_more_steps_are_counted_from_where_the_run_stands():
    before = settle(asked(train={"steps": 100}))
    after = go_on(before, ["train.steps=130"], world_size=2, step=100, samples_seen=25_600)
    assert after.config.train.samples == 25_600 + 30 * 512


def test_what_depends_on_a_changed_setting_is_settled_anew():
    before = settle(asked(train={"steps": 100}, method={"name": "declip"}))
    slip = go_on(before, ["method.name=slip"]).config
    assert slip.method.weights == {"clip": 1.0, "simclr": 1.0}
    faithful = go_on(before, ["method.faithful=true"]).config
    assert (faithful.method.nn_symmetric, faithful.optim.decayed, faithful.train.logit_scale_max) == (
        False,
        "original",
        6.0,
    )
    slower = go_on(before, ["optim.learning_rate_peak=1e-5"]).config.optim
    assert (slower.learning_rate_peak, slower.learning_rate_start) == (1e-5, pytest.approx(1e-6))
    assert go_on(before, ["optim.warmup_steps=3"]).config.optim.warmup_samples == 3 * 256
