"""A run that was interrupted ends bit for bit as one that was not."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from declip_cli.errors import TrainError
from declip_cli.train import loop, session
from declip_cli.train.run_dir import RunDir
from tests.train.small_runs import metrics, run, small_config

CASES = {
    "clip, micro-batches": {"train": {"micro_batch_size": 8}},
    "declip": {"method": {"name": "declip"}},
    "average, loader threads": {"train": {"ema_decay": 0.9}, "data": {"workers": 2}},
    "two optimizers": {"optim": {"text_optimizer": "sgd", "text_learning_rate_peak": 0.02}},
}


def stop_after(monkeypatch, steps):
    """Ask the run to stop after some steps, as Ctrl-C does."""
    step = loop._step

    def counted(training, rate):
        terms = step(training, rate)
        if training.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    monkeypatch.setattr(loop, "_step", counted)


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
    assert (reports[-1].step, reports[-1].was_stopped, reports[-1].samples_seen) == (10, False, 160)
    assert "going on from step 5 of 10" in notes
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
    step, path = loop._step, tmp_path / "run"

    def killed(training, rate):
        if training.step == 6:
            raise MemoryError("as if the machine had gone down")
        return step(training, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", killed)
        with pytest.raises(MemoryError):
            run(config, path)
    assert [record["step"] for record in metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert RunDir(path).load_state().step == 4
    run(config, path, is_resumed=True)
    assert [record["step"] for record in metrics(path)] == list(range(1, 11))
    run(config, tmp_path / "whole")
    assert_same(state_of(path), state_of(tmp_path / "whole"))
    assert [record["losses"] for record in metrics(path)] == [
        record["losses"] for record in metrics(tmp_path / "whole")
    ]


def test_a_run_killed_before_its_first_state_starts_over(tmp_path, monkeypatch):
    config, path = small_config(train={"steps": 4}), tmp_path / "run"
    step = loop._step

    def killed(training, rate):
        if training.step == 2:
            raise MemoryError("as if the machine had gone down")
        return step(training, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", killed)
        with pytest.raises(MemoryError):
            run(config, path)
    run(config, path, is_resumed=True)
    assert [record["step"] for record in metrics(path)] == [1, 2, 3, 4]


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path):
    config, path = small_config(train={"steps": 2}, optim={"warmup_steps": 0}), tmp_path / "run"
    run(config, path)
    before = state_of(path)
    reports = run(config, path, is_resumed=True)
    assert (reports[-1].step, reports[-1].is_last, reports[-1].was_stopped) == (2, True, False)
    assert_same(state_of(path), before)


def broken_after(steps, monkeypatch, value):
    """Let the update of a step break the weights."""
    step = loop._step

    def broken(training, rate):
        terms = step(training, rate)
        if training.step == steps:
            with torch.no_grad():
                training.method.encoder.visual.proj[0, 0] = value
        return terms

    monkeypatch.setattr(loop, "_step", broken)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (5, r"the loss is no longer a number at step 6 \(clip, total\)"),
        (6, r"1 weights are no longer numbers after step 6 \(first: encoder\.visual\.proj\)"),
    ],
)
def test_a_run_that_breaks_stops_and_the_last_good_state_stays(steps, message, tmp_path, monkeypatch):
    config, path = small_config(train={"checkpoint_every_steps": 2, "log_every_steps": 10}), tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_after(steps, patch, float("nan"))
        with pytest.raises(TrainError, match=message) as caught:
            run(config, path)
    assert f"declip pretrain --resume {path} --set optim.learning_rate_peak" in caught.value.remedy
    assert RunDir(path).load_state().step == 4
    assert all(value.isfinite().all() for value in state_of(path).values())
    assert not (path / "model").exists()
    assert run(config, path, is_resumed=True)[-1].step == 10


def test_the_run_stops_by_itself_after_the_second_signal_only_when_asked_three_times(tmp_path):
    with session._stop_on_signals(lambda message: None) as should_stop:
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
    assert caught.value.remedy == "resume with the options the run was started with"
