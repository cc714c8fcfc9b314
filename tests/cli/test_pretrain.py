"""`declip pretrain` as a user types it."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from declip_cli.train import loop
from tests.command_line import declip

pretrain = partial(declip, "pretrain")
SMALL = ["--data", "demo", "--steps", "3", "--batch-size", "8", "--threads", "1", "--precision", "fp32"]
SMALL += ["--set", "train.eval=[]", "--set", "train.log_every_steps=1", "--set", "data.split=fit"]


def error_of(*words, exit_code=1):
    """Run something that cannot work; return its error and its way out."""
    result = pretrain(*words)
    assert result.exit_code == exit_code, (result.stdout, result.stderr)
    assert result.stdout == ""
    error, fix = result.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert fix.startswith("  fix: ")
    return error.removeprefix("error: "), fix.removeprefix("  fix: ")


def weights_of(run):
    return load_file(run / "model" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One small run with all the fields and files there are."""
    out = tmp_path_factory.mktemp("runs") / "one"
    return pretrain(*SMALL, "--out", out, "--json"), out


def copied(done, folder):
    """Copy the small run, to change it."""
    return shutil.copytree(done[1], folder / "run")


def test_json_has_the_promised_fields_and_stdout_nothing_else(done):
    result, out = done
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    report = json.loads(result.stdout)
    assert list(report) == [
        *("run_dir", "method", "arch", "steps", "samples_seen", "seconds", "samples_per_second"),
        *("losses", "evaluations", "stopped"),
    ]
    assert (report["run_dir"], report["method"], report["arch"]) == (str(out), "declip", "vit-tiny32")
    assert (report["steps"], report["samples_seen"], report["stopped"]) == (3, 24, False)
    assert (report["evaluations"], set(report["losses"])) == ({}, {"clip", "nn", "total"})
    assert report["seconds"] > 0


def test_stderr_tells_how_the_run_goes(done):
    result, out = done
    lines = result.stderr.splitlines()
    assert lines[0] == f"run folder: {out}"
    assert lines[1].startswith("declip on vit-tiny32: ")
    assert "batch 8 × 1, 3 steps or 180 s, peak learning rate 0.001, cpu, fp32" in lines[1]
    off = "loss terms of declip that are switched off (method.weights): simsiam, mlm"
    assert lines[2] == f"{off}; recipe declip-demo says why"
    assert lines[3].startswith("step 1/3 · clip ")
    assert "samples/s · waiting " in lines[3]
    assert any(line.startswith("done: 24 samples in ") for line in lines)
    assert any(f"declip linear-probe demo --model {out}" in line for line in lines)


def test_the_run_folder_has_what_the_documentation_promises(done):
    _, out = done
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "log.txt", "model/open_clip_config.json", "model/declip.json"} <= names
    assert {"model/open_clip_model.safetensors", "state/step-000000003/state.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    config = json.loads((out / "config.json").read_text())
    assert (config["asked"]["train"]["steps"], config["run"]["total_steps"]) == (3, 3)
    assert (config["config"]["train"]["samples"], config["config"]["model"]["arch"]) == (24, "vit-tiny32")
    assert config["config"]["method"]["weights"] == {"clip": 1.0, "nn": 0.2, "simsiam": 0.0, "mlm": 0.0}
    open_settings = {"split", "workers", "loader", "cache_dir", "micro_batch_size", "threads", "processes", "init"}
    open_settings |= {"epochs", "steps", "checkpoint_every_steps", "keep_best", "eval_every_steps", "ema_decay"}
    open_settings |= {"tracker", "text_optimizer", "text_learning_rate_peak", "text_weight_decay", "warmup_steps"}
    open_settings |= {"logit_scale_learning_rate", "logit_bias_init", "head_width"}
    left = {key for section in config["config"].values() for key, value in section.items() if value is None}
    assert left <= open_settings  # what is switched off, follows another, or concerns the machine
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2, 3]


def test_lines_are_the_default(tmp_path):
    result = pretrain(*SMALL, "--out", tmp_path / "run", "--method", "clip")
    assert result.exit_code == 0, result.stderr
    fields = dict(line.split("\t") for line in result.stdout.splitlines())
    assert (fields["method"], fields["steps"], fields["stopped"]) == ("clip", "3", "False")
    assert float(fields["losses.clip"]) > 0
    assert "note: method clip has its own loss weights; those of recipe declip-demo are left out" in result.stderr


def test_without_out_a_run_gets_a_folder_of_its_own_under_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_RUNS", str(tmp_path / "all"))
    result = pretrain(*SMALL, "--json")
    (folder,) = (tmp_path / "all").iterdir()
    assert json.loads(result.stdout)["run_dir"] == str(folder)
    assert folder.name.startswith("declip-vit-tiny32-")


def test_equal_seeds_give_equal_weights_and_other_seeds_others(done, tmp_path):
    _, out = done
    for seed in (0, 1):
        assert pretrain(*SMALL, "--seed", seed, "--out", tmp_path / f"{seed}").exit_code == 0
    first, same, other = (weights_of(run)["visual.proj"] for run in (out, tmp_path / "0", tmp_path / "1"))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path, monkeypatch):
    out, step = tmp_path / "run", loop.take_step

    def interrupted(training, rate):
        os.kill(os.getpid(), signal.SIGINT)
        return step(training, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", interrupted)
        result = pretrain(*SMALL, "--out", out, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["stopped"] is True
    assert "stopped at step 1 of 3; everything is saved" in result.stderr
    assert f"resume: declip pretrain --resume {out}" in result.stderr
    result = pretrain("--resume", out, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["steps"], report["samples_seen"], report["stopped"]) == (3, 24, False)
    assert "resuming from step 1 of 3" in result.stderr


def test_a_resumed_run_is_told_what_changed_and_keeps_it(done, tmp_path):
    out = copied(done, tmp_path)
    # `--data demo` brings its recipe to a new run only.
    result = pretrain("--resume", out, "--data", "demo", "--steps", "5", "--set", "train.ema_decay=0.9", "--json")
    assert json.loads(result.stdout)["steps"] == 5
    changes = "train.samples 24 → 40, train.ema_decay None → 0.9"
    assert f"note: these settings differ from those the run was started with: {changes}\n" in result.stderr
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (settings["asked"]["train"]["steps"], settings["run"]["total_steps"]) == (5, 5)
    assert settings["config"]["train"]["batch_size"] == 8
    result = pretrain("--resume", out)
    assert "all 5 steps are already done" in result.stderr


@pytest.mark.parametrize("words", [("--out", "elsewhere"), ("--force",), ("--recipe", "declip-demo")])
def test_a_resumed_run_takes_no_options_of_a_new_one(words, done):
    assert error_of("--resume", done[1], *words)[0].startswith(
        f"--resume continues the run in its folder with its settings, {words[0]}"
    )


def test_epochs_override_the_steps_of_a_recipe():
    words = [word for word in SMALL if word not in ("--steps", "3")]
    result = pretrain(*words, "--epochs", "0.005", "--dry-run", "--json")
    assert json.loads(result.stdout)["run"]["total_steps"] == 1


def test_an_option_that_changes_nothing_is_named():
    unused = ["method.queue_size=7", "method.simclr_temperature=0.2", "train.eval_every_steps=2"]
    words = [word for assignment in unused for word in ("--set", assignment)]
    result = pretrain(*SMALL, "--method", "filip", *words, "--dry-run", "--json")
    assert "note: method filip does not use method.queue_size\n" in result.stderr
    assert "note: method filip does not use method.simclr_temperature\n" in result.stderr
    assert "note: train.eval_every_steps changes nothing without --eval\n" in result.stderr
    assert json.loads(result.stdout)["config"]["method"]["pairs"] == 4  # the recipe's is DeCLIP's


def test_a_file_for_another_method_lends_what_both_have(tmp_path):
    (tmp_path / "run.toml").write_text("[method]\nweights = { nn = 0.3 }\nlabel_smoothing = 0.2\nqueue_size = 7\n")
    words = ["--config", tmp_path / "run.toml", "--data", "demo", "--arch", "vit-tiny32", "--method", "clip"]
    result = pretrain(*words, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    method = json.loads(result.stdout)["config"]["method"]
    assert (method["weights"], method["label_smoothing"], method["queue_size"]) == ({"clip": 1.0}, 0.2, 65536)


def test_a_dry_run_of_a_run_that_goes_on_counts_from_where_it_stands(done):
    _, out = done
    result = pretrain("--resume", out, "--steps", "7", "--batch-size", "16", "--dry-run", "--json")
    run = json.loads(result.stdout)["run"]
    assert (run["samples"], run["total_steps"]) == (24 + 4 * 16, 7)


@pytest.mark.parametrize("way", ["option", "assignment", "file"])
def test_a_method_can_be_named_in_three_ways_that_are_one(way, tmp_path):
    (tmp_path / "run.toml").write_text('[method]\nname = "slip"\n')
    ways = {"option": ["--method", "slip"], "assignment": ["--set", "method.name=slip"]}
    words = ways.get(way, ["--config", tmp_path / "run.toml"])
    result = pretrain(*SMALL, "--recipe", "declip-demo", *words, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    config = json.loads(result.stdout)["config"]
    assert config["method"]["weights"] == {"clip": 1.0, "simclr": 1.0}
    assert (config["method"]["name"], config["method"]["pairs"]) == ("slip", 4)
    assert "note: method slip has its own loss weights; those of recipe declip-demo are left out" in result.stderr


def test_a_dry_run_says_what_would_run_and_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_RUNS", str(tmp_path / "runs"))
    result = pretrain("--data", "demo", "--arch", "vit-tiny64", "--dry-run", "--json", "--set", "train.processes=2")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["run"]["num_pairs"], report["run"]["global_batch"], report["run"]["total_steps"]) == (3034, 512, 720)
    assert report["run"]["samples"] == 720 * 512
    assert report["config"]["model"]["image_side_px"] == 64
    assert report["memory_mib"]["total"] == pytest.approx(sum(report["memory_mib"].values()) / 2, abs=0.5)
    assert 0 < report["run"]["largest_micro_batch"] <= 256
    assert report["run"]["free_memory_mib"] > 0
    assert report["run"]["compiled"].startswith("not compiled: train.compile = auto does that on GPUs only")
    assert not (tmp_path / "runs").exists()
    lines = dict(line.split("\t") for line in pretrain("--data", "demo", "--dry-run").stdout.splitlines())
    assert (lines["run.total_steps"], lines["config.optim.gradient_clip_norm"]) == ("720", "1")


def test_help_tells_defaults_and_choices():
    text = " ".join(pretrain("--help").stdout.replace("│", " ").split())
    for words in ("<clip|slip|filip|declip|", "<auto|fp32|bf16|fp16>", "[default: (256)]", "[default: (32);"):
        assert words in text
    assert "[default: 0]" not in text
    assert "[default: -1]" not in text


def test_with_everything_frozen_there_is_nothing_to_train(tmp_path):
    words = ["--method", "clip", "--set", 'train.freeze=["image", "text"]']
    words += ["--set", "optim.logit_scale_learning_rate=0"]
    assert error_of(*SMALL, *words, "--out", tmp_path / "run")[0] == "everything is frozen, nothing is left to train"


def test_a_run_can_start_from_another_model(done, tmp_path):
    _, first = done
    still = ["--set", "optim.learning_rate_start=0", "--learning-rate", "1e-12", "--set", "optim.weight_decay=0"]
    result = pretrain(*SMALL, *still, "--init", first, "--out", tmp_path / "second")
    assert result.exit_code == 0, result.stderr
    for name, value in weights_of(first).items():
        torch.testing.assert_close(weights_of(tmp_path / "second")[name], value, rtol=0, atol=1e-6)


def test_a_frozen_tower_keeps_its_weights(done, tmp_path):
    _, first = done
    result = pretrain(*SMALL, "--init", first, "--set", "train.freeze=image", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    before, after = weights_of(first), weights_of(tmp_path / "run")
    for name, value in before.items():
        if name.startswith("visual."):
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["ln_final.weight"], before["ln_final.weight"])


@pytest.mark.usefixtures("quick_ranks")
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    words = [*SMALL, "--method", "clip", "--set", "optim.warmup_steps=1"]
    alone = pretrain(*words, "--batch-size", 16, "--out", tmp_path / "alone", "--json")
    together = pretrain(*words, "--processes", 2, "--out", tmp_path / "together", "--json")
    assert together.exit_code == 0, together.stderr
    first, second = json.loads(alone.stdout), json.loads(together.stdout)
    assert second["samples_seen"] == first["samples_seen"] == 48
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-5)
    records = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "together")]
    assert [json.loads(line)["step"] for line in records[1]] == [1, 2, 3]
    for one, two in zip(*records, strict=True):
        assert json.loads(two)["losses"] == pytest.approx(json.loads(one)["losses"], rel=1e-5)


def test_force_replaces_a_run(done, tmp_path):
    out = copied(done, tmp_path)
    result = pretrain(*SMALL, "--steps", "2", "--out", out, "--force")
    assert result.exit_code == 0, result.stderr
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_file_of_settings_is_overridden_by_options_and_these_by_assignments(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[model]\narch = "vit-tiny32"\n[method]\nname = "clip"\n[data]\npart = "fit"\n'
        '[train]\nprecision = "fp32"\nsteps = 9\nbatch_size = 8\nseed = 4\nlog_every_steps = 1\n'
    )
    words = ["--config", tmp_path / "run.toml", "--data", "demo", "--steps", "5", "--set", "train.steps=2"]
    report = json.loads(pretrain(*words, "--threads", "1", "--dry-run", "--json").stdout)
    assert (report["run"]["total_steps"], report["run"]["num_pairs"]) == (2, 1817)
    train = report["config"]["train"]
    assert (train["batch_size"], train["seed"]) == (8, 4)


def test_the_recipes_are_listed():
    result = pretrain("--list-recipes")
    assert result.exit_code == 0
    names = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert {"declip-demo", "declip-yfcc15m-vit-b32", "clip-yfcc15m-rn50"} <= set(names)
    listed = json.loads(pretrain("--list-recipes", "--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in listed] == names
    assert all(recipe["title"] for recipe in listed)


def test_no_data_is_an_error():
    error, fix = error_of("--arch", "vit-tiny32")
    assert error == "no data to train on"
    assert "--data demo" in fix


@pytest.mark.parametrize(
    ("words", "error", "fix"),
    [
        (["--arch", "vit-b-32"], "unknown architecture 'vit-b-32'", "did you mean vit-b32?"),
        (["--recipe", "declip-dmo"], "unknown recipe 'declip-dmo'", "did you mean declip-demo"),
        (["--set", "method.name=blip"], "method.name must be one of clip, slip, filip, declip, defilip", "--set"),
        (
            ["--set", "train.precision=int8"],
            "train.precision must be one of auto, fp32, bf16, fp16 (got 'int8')",
            "--set",
        ),
        (
            ["--set", "method.weights.mlmm=1"],
            "method declip has no loss term mlmm",
            "its terms are clip, simsiam, mlm, nn",
        ),
        (["--set", "train.tracker=nothing"], "train.tracker must be one of tensorboard, wandb, mlflow", "--set"),
        (
            ["--set", "train.eval=['demo']", "--set", "train.keep_best=demo.top9"],
            "train.keep_best is not a score",
            "choose from demo.top1",
        ),
        (["--set", "train.keep_best=demo.top1"], "train.keep_best is not a score of this run", "name an evaluation"),
    ],
)
def test_a_wrong_choice_is_wrong_usage(words, error, fix, tmp_path):
    found, remedy = error_of(*SMALL, *words, "--out", tmp_path / "run", exit_code=2)
    assert found.startswith(error)
    assert fix in remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--method", "blip"], ["--precision", "int8"], ["--steps", "0"], ["--seed", "-1"]])
def test_an_option_refuses_what_it_does_not_know(words):
    result = pretrain(*SMALL, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value" in result.stderr


@pytest.mark.parametrize(
    ("words", "error", "fix"),
    [
        (["--set", "train.step=3"], "unknown key 'train.step'", "did you mean 'steps'?"),
        (["--set", "steps=3"], "--set wants section.key=value (got 'steps=3')", "--set train.ema_decay"),
        (["--config", "none.toml"], "cannot read the configuration file none.toml", "check the path"),
        (["--batch-size", "1"], "--batch-size must be at least 2", "--batch-size 256"),
        (
            ["--set", "optim.warmup_steps=3"],
            "optim.warmup_steps must be less than the steps of the run (got 3, 3)",
            "--set",
        ),
        (["--precision", "fp16", "--set", "train.device=cpu"], "fp16 needs a GPU (found cpu)", "--precision bf16"),
        (["--batch-size", "100000"], "", "--batch-size"),
        (["--init", "nowhere"], "no model at nowhere", "--init takes"),
        (
            ["--set", "optim.optimizer=sgd", "--set", "optim.learning_rate_peak=none"],
            "optim.optimizer = sgd has no",
            "--lea",
        ),
    ],
)
def test_what_cannot_work_is_an_error_with_a_way_out(words, error, fix, tmp_path):
    found, remedy = error_of(*SMALL, *words, "--out", tmp_path / "run")
    assert found.startswith(error)
    assert remedy.startswith(fix) or fix in remedy


def test_a_run_that_could_not_start_does_not_block_its_folder(tmp_path):
    error_of(*SMALL, "--init", "nowhere", "--out", tmp_path / "run")
    assert pretrain(*SMALL, "--out", tmp_path / "run").exit_code == 0


def test_data_that_is_missing_is_an_error_that_names_it(tmp_path):
    error, _ = error_of("--data", tmp_path / "shards", "--precision", "fp32", "--out", tmp_path / "run")
    assert str(tmp_path / "shards") in error


def test_an_existing_run_is_not_overwritten(done):
    _, out = done
    error, fix = error_of(*SMALL, "--out", out)
    assert error == f"the run folder {out} already holds files"
    assert f"--resume {out}" in fix


def test_nothing_to_resume_is_an_error(tmp_path):
    error, fix = error_of("--resume", tmp_path / "nowhere")
    assert error.startswith(f"no run to resume at {tmp_path / 'nowhere'}")
    assert fix.startswith("--resume takes the run folder")


def test_a_model_of_another_size_to_start_from_is_an_error(done, tmp_path):
    _, first = done
    error, fix = error_of(*SMALL, "--init", first, "--set", "model.embed_dim=7", "--out", tmp_path / "run")
    assert error.startswith(f"--init {first} does not fit --arch vit-tiny32: ")
    assert fix == "--set model.embed_dim=none, which copies it from the model"


def test_an_evaluation_set_that_is_missing_is_found_out_before_the_training(tmp_path):
    out = tmp_path / "run"
    words = [word for word in SMALL if word != "train.eval=[]"]
    words.pop(words.index("--set"))
    error_of(*words, "--eval", tmp_path / "nowhere", "--out", out)
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("words", [["--no-such-option"], ["--steps", "many"], ["--steps", "-1"]])
def test_wrong_usage_exits_with_2(words):
    result = pretrain(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
