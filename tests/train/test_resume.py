"""A run that was interrupted ends bit for bit as one that was not."""

import json
import math
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from declip_cli.config_files import merge_into
from declip_cli.errors import DataError, TrainError
from declip_cli.interop.read import load_model
from declip_cli.resolve import resolve_run
from declip_cli.train import loop
from declip_cli.train import run as run_module
from declip_cli.train.run_dir import RunDir
from tests.train.small_runs import metrics, run, small_config

CASES = {
    "clip, micro-batches": {"train": {"micro_batch_size": 4}},
    "declip": {"method": {"name": "declip"}},
    "aclip": {"method": {"name": "aclip"}},
    "average, loader threads": {"train": {"ema_decay": 0.9}, "data": {"workers": 2}},
    "two optimizers": {"optim": {"text_optimizer": "sgd", "text_learning_rate_peak": 0.02}},
}


def stop_after(monkeypatch, steps):
    """Ask the run to stop after some steps, as Ctrl-C does."""
    step = loop.take_step

    def counted(training, learning_rate):
        outcome = step(training, learning_rate)
        if training.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return outcome

    monkeypatch.setattr(loop, "take_step", counted)


def killed_after(monkeypatch, steps, config, path):
    """Let a run end after some steps without any goodbye."""
    step = loop.take_step

    def killed(training, learning_rate):
        if training.step == steps:
            raise OSError("as if the machine had gone down")
        return step(training, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", killed)
        with pytest.raises(OSError, match="gone down"):
            run(config, path)


def merged(*sections):
    settings = {}
    for section in sections:
        merge_into(settings, section)
    return settings


def state_of(path):
    state = RunDir(path).load_state()
    return {f"{group}/{name}": value for group, tensors in state.tensors.items() for name, value in tensors.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_five_steps_and_five_more_are_ten_steps(case, tmp_path, monkeypatch):
    config = small_config(**CASES[case])
    whole, halves, notes = tmp_path / "whole", tmp_path / "halves", []
    run(config, whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        reports = run(config, halves, notes=notes)
    assert (reports[-1].step, reports[-1].was_stopped, reports[-1].is_last) == (5, True, True)
    assert any("stopping after this step" in note for note in notes)
    assert RunDir(halves).load_state().step == 5
    reports = run(config, halves, is_resumed=True, notes=notes)
    assert (reports[-1].step, reports[-1].was_stopped, reports[-1].samples_seen) == (10, False, 80)
    assert "resuming from step 5 of 10" in notes
    assert_same(state_of(halves), state_of(whole))
    for name in ("open_clip_model.safetensors", "declip_extra.safetensors"):
        assert_same(load_file(halves / "model" / name), load_file(whole / "model" / name))
    for key in ("step", "losses", "learning_rate", "logit_scale", "samples_seen"):
        assert [record[key] for record in metrics(halves)] == [record[key] for record in metrics(whole)]
    assert [record["step"] for record in metrics(whole)] == list(range(1, 11))


def test_the_averaged_model_is_the_one_saved(tmp_path):
    run(small_config(train={"ema_decay": 0.5, "steps": 3}), tmp_path / "run")
    state = RunDir(tmp_path / "run").load_state().tensors
    saved = load_file(tmp_path / "run" / "model" / "open_clip_model.safetensors")
    assert torch.equal(saved["visual.proj"], state["average"]["visual.proj"])
    assert not torch.equal(saved["visual.proj"], state["method"]["encoder.visual.proj"])


def test_metrics_of_steps_that_are_taken_again_are_dropped(tmp_path, monkeypatch):
    config = small_config(train={"checkpoint_every_steps": 4})
    path = tmp_path / "run"
    killed_after(monkeypatch, 6, config, path)
    assert [record["step"] for record in metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert RunDir(path).load_state().step == 4
    run(config, path, is_resumed=True)
    assert [record["step"] for record in metrics(path)] == list(range(1, 11))
    run(config, tmp_path / "whole")
    assert_same(state_of(path), state_of(tmp_path / "whole"))
    losses = [[record["losses"] for record in metrics(folder)] for folder in (path, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_a_run_killed_before_its_first_state_starts_over(tmp_path, monkeypatch):
    config, path = small_config(train={"steps": 4}), tmp_path / "run"
    killed_after(monkeypatch, 2, config, path)
    run(config, path, is_resumed=True)
    assert [record["step"] for record in metrics(path)] == [1, 2, 3, 4]


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path):
    config, path = small_config(train={"steps": 2}, optim={"warmup_steps": 0}), tmp_path / "run"
    run(config, path)
    before = state_of(path)
    reports = run(config, path, is_resumed=True)
    assert (reports[-1].step, reports[-1].is_last, reports[-1].was_stopped) == (2, True, False)
    assert_same(state_of(path), before)


def test_the_model_of_a_run_in_progress_can_be_loaded(tmp_path, monkeypatch):
    path, loaded = tmp_path / "run", []
    step = loop.take_step

    def looked_at(training, learning_rate):
        if training.step > 2:
            loaded.append(load_model(path).encoder.visual.proj.detach())
        return step(training, learning_rate)

    monkeypatch.setattr(loop, "take_step", looked_at)
    run(small_config(train={"checkpoint_every_steps": 2, "steps": 7}), path)
    assert len(loaded) == 4  # before steps 4 to 7: of steps 2, 4, 4 and 6
    assert torch.equal(loaded[1], loaded[2])
    assert not torch.equal(loaded[0], loaded[1])
    assert not torch.equal(loaded[2], loaded[3])


def test_the_best_model_by_a_score_is_kept(tmp_path):
    scores = iter([0.1, 0.5, 0.3, 0.2])
    config = small_config(train={"steps": 8, "eval_every_steps": 2, "keep_best": "set.top1"})
    weights = []

    def evaluate(model):
        weights.append(model.encoder.visual.proj.detach().clone())
        return {"set": {"top1": next(scores)}}

    run(config, tmp_path / "run", evaluate=evaluate)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best == {"key": "set.top1", "score": 0.5, "step": 4}
    assert torch.equal(load_model(tmp_path / "run" / "best").encoder.visual.proj, weights[1])
    assert torch.equal(load_model(tmp_path / "run").encoder.visual.proj, weights[3])


def test_a_damaged_newest_state_is_passed_over_and_the_run_ends_the_same(tmp_path, monkeypatch):
    config = small_config(train={"checkpoint_every_steps": 3})
    path, notes = tmp_path / "run", []
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        run(config, path)
    damaged = path / "state" / "step-000000007" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    run(config, path, is_resumed=True, notes=notes)
    assert any("step-000000007 is damaged" in note and note.endswith("from step-000000006 instead") for note in notes)
    run(config, tmp_path / "whole")
    assert_same(state_of(path), state_of(tmp_path / "whole"))
    assert [record["step"] for record in metrics(path)] == list(range(1, 11))


def test_the_settings_of_a_run_repeat_it(tmp_path):
    run(small_config(method={"name": "declip"}), tmp_path / "first")
    asked, _ = resolve_run(None, tmp_path / "first" / "config.json", {}, [])
    assert asked.optim.warmup_samples is not None
    run(asked, tmp_path / "second")
    assert_same(state_of(tmp_path / "second"), state_of(tmp_path / "first"))
    digests = [RunDir(tmp_path / name).read_run().digest for name in ("first", "second")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("batch_size", [4, 16])
def test_another_batch_keeps_rate_warm_up_and_end(batch_size, tmp_path, monkeypatch):
    config = small_config(train={"steps": 20}, optim={"warmup_steps": 8})
    path, notes = tmp_path / "run", []
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(config, path)
    other = small_config(train={"steps": 20, "batch_size": batch_size}, optim={"warmup_steps": 8})
    reports = run(other, path, is_resumed=True, notes=notes)
    assert reports[-1].samples_seen == 20 * 8
    steps = 4 + (20 - 4) * 8 // batch_size
    assert (reports[-1].step, reports[-1].total_steps) == (steps, steps)
    assert any(f"train.batch_size 8 → {batch_size}" in note for note in notes)
    run(config, tmp_path / "whole")
    rates = {record["samples_seen"]: record["learning_rate"] for record in metrics(tmp_path / "whole")}
    found = {record["samples_seen"]: record["learning_rate"] for record in metrics(path)}
    shared = set(rates) & set(found)
    assert len(shared) >= 12
    assert {seen: found[seen] for seen in shared} == pytest.approx({seen: rates[seen] for seen in shared})
    assert found[160] == pytest.approx(0.0, abs=1e-12)


CHANGES = {
    "optim.weight_decay=0": ({"optim": {"weight_decay": 0.0}}, None),
    "optim.layer_decay": ({"optim": {"layer_decay": 0.8}}, None),
    "optim.text_learning_rate_peak": ({"optim": {"text_learning_rate_peak": 1e-4}}, None),
    "train.freeze=image": (
        {"train": {"freeze": ["image"]}},
        r"the moments of \d+ parameters \(first: .*\), not trained",
    ),
    "train.freeze=text": ({"train": {"freeze": ["text"]}}, r"the moments of \d+ parameters \(first: .*\), not trained"),
    "optim.logit_scale_learning_rate=0": (
        {"optim": {"logit_scale_learning_rate": 0.0}},
        r"the moments of 1 parameters \(first: encoder\.logit_scale\), not trained",
    ),
    "method.faithful=true": (
        {"method": {"faithful": True}},
        r"the moments of 1 parameters \(first: encoder\.visual\.conv1\.weight\), not trained",
    ),
    "optim.learning_rate_peak": ({"optim": {"learning_rate_peak": 1e-5}}, None),
    "optim.optimizer=sgd": (
        {"optim": {"optimizer": "sgd", "learning_rate_peak": 0.01}},
        r"the moments of \d+ parameters .* are reinitialized",
    ),
    "optim.text_optimizer=sgd": (
        {"optim": {"text_optimizer": "sgd", "text_learning_rate_peak": 0.01}},
        r"the moments of \d+ parameters \(first: encoder\.text.* are reinitialized",
    ),
    "method.name=declip": (
        {"method": {"name": "declip"}},
        r"mlm_head, predictor, projector, queue of the method is reinitialized",
    ),
    "method.name=filip": (
        {"method": {"name": "filip"}},
        r"encoder\.token_wise, logit_scale_dense of the method is reinitialized",
    ),
    "train.ema_decay": ({"train": {"ema_decay": 0.9}}, None),
    "train.micro_batch_size": ({"train": {"micro_batch_size": 4}}, None),
    "train.ema_decay and the method": ({"train": {"ema_decay": 0.9}, "method": {"name": "filip"}}, r"reinitialized"),
    "train.seed": ({"train": {"seed": 1}}, DataError),
}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run of CLIP that was stopped after two of four steps."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        run(small_config(train={"steps": 4}, optim={"warmup_steps": 1}), path)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_starts_only_what_is_new_and_says_so(change, stopped_run, tmp_path):
    sections, expected = CHANGES[change]
    path, notes = tmp_path / "run", []
    shutil.copytree(stopped_run, path)
    settings = merged({"train": {"steps": 4}, "optim": {"warmup_steps": 1}}, sections)
    if isinstance(expected, type):
        with pytest.raises(expected):
            run(small_config(**settings), path, is_resumed=True)
        return
    before = RunDir(path).load_state().tensors["optimizer"]
    reports = run(small_config(**settings), path, is_resumed=True, notes=notes)
    assert reports[-1].step == 4
    assert all(math.isfinite(record["losses"]["total"]) for record in metrics(path))
    assert all(value.isfinite().all() for value in state_of(path).values() if value.is_floating_point())
    about = [note for note in notes if "reinitialized" in note or "dropped" in note]
    if expected is None:
        assert about == []
    else:
        assert any(re.search(expected, note) for note in about), notes
    if change == "optim.weight_decay=0":
        assert {name for name in before if name.endswith("exp_avg")} <= set(
            RunDir(path).load_state().tensors["optimizer"]
        )


@pytest.mark.parametrize("change", ["optim.weight_decay=0", "optim.layer_decay", "optim.text_learning_rate_peak"])
def test_regrouped_parameters_keep_their_own_moments(change, stopped_run, tmp_path, monkeypatch):
    path = tmp_path / "run"
    shutil.copytree(stopped_run, path)
    saved = RunDir(path).load_state().tensors["optimizer"]
    found = {}

    def look(training, learning_rate):
        names = {id(parameter): name for name, parameter in training.method.named_parameters()}
        for optimizer in training.optimizers:
            for parameter, values in optimizer.state.items():
                found.update({f"{names[id(parameter)]}.{key}": value.clone() for key, value in values.items()})
        raise MemoryError("seen enough")

    monkeypatch.setattr(loop, "take_step", look)
    with pytest.raises(TrainError, match="memory"):
        run(small_config(**merged({"train": {"steps": 4}}, CHANGES[change][0])), path, is_resumed=True)
    assert_same(found, saved)


def broken_after(steps, monkeypatch, value, *, times=1):
    """Let the update of a step break the weights, as often as it is taken."""
    step, left = loop.take_step, [times]

    def broken(training, learning_rate):
        outcome = step(training, learning_rate)
        if training.step == steps and left[0] > 0:
            left[0] -= 1
            with torch.no_grad():
                training.method.encoder.visual.proj[0, 0] = value
        return outcome

    monkeypatch.setattr(loop, "take_step", broken)


def test_a_broken_batch_is_skipped_and_counted(tmp_path, monkeypatch):
    config = small_config(method={"name": "declip", "queue_size": 100}, train={"steps": 8})
    forward, seen = loop.forward_backward, []

    def spoiled(method, batch, **options):
        result = forward(method, batch, **options)
        if len(seen) in (3, 5):
            method.encoder.visual.proj.grad[0] = float("nan")
            result.embeddings.texts[:] = float("nan")
        seen.append({name: value.clone() for name, value in method.state_dict().items()})
        return result

    monkeypatch.setattr(loop, "forward_backward", spoiled)
    reports = run(config, tmp_path / "run")
    assert (reports[-1].step, reports[-1].num_bad_steps) == (8, 2)
    assert [record["num_bad_steps"] for record in metrics(tmp_path / "run")] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [bool(record["losses"]) for record in metrics(tmp_path / "run")] == [True] * 3 + [False, True, False] + [
        True
    ] * 2
    for bad in (3, 5):
        for name, value in seen[bad].items():
            if "running" not in name and "num_batches" not in name:  # seen before the update, while statistics are new
                assert torch.equal(value, seen[bad + 1][name]) or "running" in name, name
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run").values() if value.is_floating_point())
    advice = [sentence for report in reports for sentence in report.advice]
    assert "1 batches before step 4 had a broken gradient and were skipped" in advice


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_that_breaks_goes_back_to_the_last_good_state_at_half_the_rate(step, tmp_path, monkeypatch):
    config = small_config(train={"checkpoint_every_steps": 2, "log_every_steps": 3, "max_bad_steps": 2, "steps": 12})
    notes = []
    broken_after(step, monkeypatch, float("nan"))
    reports = run(config, tmp_path / "run", notes=notes)
    assert (reports[-1].step, reports[-1].was_stopped) == (12, False)
    assert sum("back to step 4, at 1/2 of the rate" in note for note in notes) == 1
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run").values() if value.is_floating_point())
    run(config, tmp_path / "whole")
    rates = {r["step"]: r["learning_rate"] for r in metrics(tmp_path / "whole")}
    found = {r["step"]: r["learning_rate"] for r in metrics(tmp_path / "run")}
    assert found[3] == pytest.approx(rates[3])
    assert found[9] == pytest.approx(rates[9] / 2)


def test_a_run_that_keeps_breaking_ends_with_a_report_and_a_good_state(tmp_path, monkeypatch):
    train = {"checkpoint_every_steps": 2, "log_every_steps": 1, "max_bad_steps": 2, "max_rollbacks": 2}
    config, path = small_config(train=train), tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_after(5, patch, float("nan"), times=99)
        with pytest.raises(TrainError, match="going back to a good state 2 times did not help") as caught:
            run(config, path)
    assert f"declip pretrain --resume {path} --learning-rate" in caught.value.remedy
    assert RunDir(path).load_state().step == 4
    assert run(config, path, is_resumed=True)[-1].step == 10


def test_without_a_state_a_broken_run_ends(tmp_path, monkeypatch):
    broken_after(2, monkeypatch, float("inf"))
    with pytest.raises(TrainError, match="2 batches in a row had a broken gradient, up to step 4"):
        run(small_config(train={"max_bad_steps": 2}), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": {"name": "filip"}, "train": {"ema_decay": 0.9}}, {"method": {"name": "declip"}}),
        ({"method": {"name": "clip"}, "train": {"ema_decay": 0.9}}, {"method": {"name": "defilip"}}),
        (
            {"optim": {"optimizer": "sgd", "learning_rate_peak": 0.01}, "train": {"freeze": ["image"]}},
            {"train": {"freeze": []}},
        ),
    ],
)
def test_a_state_that_lacks_some_of_what_is_trained_now_is_no_hindrance(first, second, tmp_path, monkeypatch):
    path, short = tmp_path / "run", {"train": {"steps": 4}, "optim": {"warmup_steps": 1}}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(small_config(**merged(short, first)), path)
    reports = run(small_config(**merged(short, first, second)), path, is_resumed=True)
    assert reports[-1].step == 4
    assert all(value.isfinite().all() for value in state_of(path).values() if value.is_floating_point())


def test_a_run_whose_states_are_gone_says_that_it_starts_over(tmp_path):
    config, notes = small_config(train={"steps": 2}, optim={"warmup_steps": 0}), []
    run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    run(config, tmp_path / "run", is_resumed=True, notes=notes)
    assert f"note: {tmp_path / 'run'} has no saved state: the run starts at step 0" in notes


def test_a_time_limit_that_is_over_ends_a_resumed_run_at_once(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(small_config(), path)
    reports = run(small_config(train={"time_limit_s": 1e-6}), path, is_resumed=True)
    assert (reports[-1].step, reports[-1].was_stopped) == (4, False)


def test_a_time_limit_ends_the_run_with_its_schedule(tmp_path, monkeypatch):
    now, step = [1000.0], loop.take_step

    def slow(training, learning_rate):
        outcome = step(training, learning_rate)
        now[0] += 10.0 if training.step == 1 else 1.0  # the first step compiles
        return outcome

    monkeypatch.setattr(loop, "take_step", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = small_config(train={"steps": 1000, "time_limit_s": 30.0}, optim={"warmup_steps": None})
    reports = run(config, tmp_path / "run")
    assert reports[-1].step == 21
    rates = [record["learning_rate"] for record in metrics(tmp_path / "run")]
    peak = 1e-3 * (8 / 4096) ** 0.5
    assert rates[1] == pytest.approx(peak / 10, rel=0.1)  # the clock starts after the first step
    assert rates[3] == pytest.approx(peak)  # a tenth of the time: two steps
    assert rates[12] == pytest.approx(peak / 2, rel=0.1)
    assert rates[-1] < 0.02 * peak


def test_the_run_stops_by_itself_after_the_second_signal_only_when_asked_three_times(tmp_path):
    with run_module._stop_on_signals(lambda message: None) as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_state_of_another_architecture_is_an_error(tmp_path):
    path = tmp_path / "run"
    run(small_config(train={"steps": 3}), path)
    other = small_config(model={"embed_dim": 7})
    with pytest.raises(TrainError, match="the saved state does not fit the configuration: ") as caught:
        run(other, path, is_resumed=True)
    assert caught.value.remedy.startswith("resume with the model options the run was started with")
