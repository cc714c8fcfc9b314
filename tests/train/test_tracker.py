"""Reports reach a tracker once each, also when a run is interrupted and goes on."""

import json
import sys

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from declip_cli.errors import TrainError
from declip_cli.train import loop
from tests.train.small_runs import metrics, run, small_config

WRITE = """
import json, types
def _write(**words):
    with open(LOG, "a") as file:
        file.write(json.dumps(words) + "\\n")
"""
WANDB = """
class _Run:
    def define_metric(self, name, step_metric): _write(what="define", name=name, step_metric=step_metric)
    def log(self, values, step=None): _write(what="log", values=values, step=step)
    def finish(self): _write(what="finish")
class config:
    def update(values, allow_val_change): _write(what="config", values=values)
def init(**options):
    if REFUSES: raise RuntimeError("api_key not configured (no-tty)")
    _write(what="init", **options)
    return _Run()
"""
MLFLOW = """
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location, tags): return name
def start_run(run_id, run_name, **options):
    _write(what="init", id=run_id, name=run_name)
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-of-the-server"))
def log_params(values): _write(what="config", values=values)
def log_metrics(values, step=None): _write(what="log", values=values, step=step)
def end_run(): _write(what="finish")
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 500, 100
"""


def install(tmp_path, monkeypatch, name, code, *, refuses=False):
    """Put a package in place of a tracker's own; return what it is told, once a run is over."""
    log, folder = tmp_path / "calls.jsonl", tmp_path / "packages"
    (folder / f"{name}-99.dist-info").mkdir(parents=True)
    (folder / f"{name}-99.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
    (folder / f"{name}.py").write_text(f"LOG, REFUSES = {str(log)!r}, {refuses}\n{WRITE}{code}")
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name)])  # looked up when first imported
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def interrupted_and_resumed(config, path, monkeypatch):
    """Save after step 4, die in step 7, go on."""
    step = loop.take_step

    def dies(training, learning_rate):
        if training.step == 6:
            raise KeyError("killed")
        return step(training, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dies)
        with pytest.raises(KeyError):
            run(config, path)
    run(config, path, is_resumed=True)


def tracked_by(name):
    return small_config(train={"tracker": name, "checkpoint_every_steps": 4, "keep_states": 1})


def test_tensorboard_holds_every_step_once_though_the_run_was_interrupted(tmp_path, monkeypatch):
    interrupted_and_resumed(tracked_by("tensorboard"), tmp_path / "run", monkeypatch)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 11))
    for tag, key in (("loss/total", "losses"), ("learning_rate", None)):
        points = events.Scalars(tag)
        assert [point.step for point in points] == list(range(1, 11))
        expected = [record[key]["total"] if key else record[tag] for record in records]
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_goes_on_under_its_name_at_wandb(tmp_path, monkeypatch):
    calls_of = install(tmp_path, monkeypatch, "wandb", WANDB)
    interrupted_and_resumed(tracked_by("wandb"), tmp_path / "run", monkeypatch)
    calls = calls_of()
    first, second = (call for call in calls if call["what"] == "init")
    assert first == second == {"what": "init", "project": "declip", "id": first["id"], "resume": "allow", "name": "run"}
    # The axis is a value of its own: W&B drops what comes under a step before its last.
    assert {"what": "define", "name": "*", "step_metric": "step"} in calls
    logged = [call for call in calls if call["what"] == "log"]
    assert [call["values"]["step"] for call in logged] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]
    assert {call["step"] for call in logged} == {None}
    assert logged[-1]["values"]["loss/total"] == pytest.approx(metrics(tmp_path / "run")[-1]["losses"]["total"])
    assert [call["what"] for call in calls].count("finish") == 2
    assert next(call for call in calls if call["what"] == "config")["values"]["train.tracker"] == "wandb"


def test_a_resumed_run_goes_on_under_its_name_at_mlflow(tmp_path, monkeypatch):
    calls_of = install(tmp_path, monkeypatch, "mlflow", MLFLOW)
    interrupted_and_resumed(tracked_by("mlflow"), tmp_path / "run", monkeypatch)
    calls = calls_of()
    begun = [call["id"] for call in calls if call["what"] == "init"]
    assert begun == [None, "run-of-the-server"]
    assert [call["step"] for call in calls if call["what"] == "log"] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]
    first_of_second = calls[[call["what"] for call in calls].index("finish") + 1 :]
    assert "config" not in {call["what"] for call in first_of_second}  # MLflow refuses other values


def test_a_tracker_that_cannot_start_is_an_error_that_leaves_no_run_folder(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "wandb", WANDB, refuses=True)
    with pytest.raises(TrainError, match="cannot start the tracker wandb: api_key not configured") as caught:
        run(tracked_by("wandb"), tmp_path / "run")
    assert "WANDB_MODE=offline" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_in_use_is_found_before_a_tracker_starts(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    install(tmp_path, monkeypatch, "wandb", WANDB, refuses=True)
    with pytest.raises(TrainError, match="already holds files"):
        run(tracked_by("wandb"), tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(TrainError, match="train.tracker is mlflow, which is not installed") as caught:
        run(tracked_by("mlflow"), tmp_path / "run")
    assert caught.value.remedy == "pip install 'declip[mlflow]'"
