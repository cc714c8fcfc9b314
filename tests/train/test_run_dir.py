import errno
import json

import pytest
import torch

from declip_cli.config import RunConfig, TrainConfig
from declip_cli.errors import TrainError
from declip_cli.train import run_dir as module
from declip_cli.train.run_dir import RunDir, SavedState, default_run_dir, optimizer_tensors, restore_optimizers


def state(step):
    return SavedState(step=step, tensors={"method": {"w": torch.full((3,), float(step))}}, values={"epoch": step})


@pytest.fixture
def run_dir(tmp_path):
    made = RunDir(tmp_path / "run")
    made.create(RunConfig(train=TrainConfig(steps=7, eval=("demo",))), force=False)
    return made


def test_the_configuration_is_read_back_and_names_the_versions(run_dir):
    assert run_dir.read_config() == RunConfig(train=TrainConfig(steps=7, eval=("demo",)))
    content = json.loads((run_dir.path / "config.json").read_text())
    assert {"torch", "declip", "python", "accelerate"} <= set(content["versions"])


def test_a_run_is_named_by_method_architecture_and_time(tmp_path):
    assert default_run_dir(tmp_path, method="slip", arch="rn50").name.startswith("slip-rn50-20")


def test_a_folder_with_files_is_not_overwritten(run_dir):
    run_dir.append_log("started")
    with pytest.raises(TrainError, match="already holds files") as caught:
        run_dir.create(RunConfig(), force=False)
    assert f"--resume {run_dir.path}" in caught.value.remedy
    assert "--force" in caught.value.remedy
    run_dir.save_state(state(3))
    run_dir.create(RunConfig(), force=True)
    assert not run_dir.has_state()
    assert run_dir.read_config() == RunConfig()


def test_force_does_not_delete_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(TrainError, match="is no run folder, so --force does not delete it"):
        RunDir(tmp_path).create(RunConfig(), force=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"dear"


def test_the_folder_of_a_run_that_could_not_start_can_be_used_again(run_dir):
    run_dir.create(RunConfig(), force=False)
    assert run_dir.read_config() == RunConfig()


def test_an_empty_folder_can_be_used(tmp_path):
    RunDir(tmp_path).create(RunConfig(), force=False)
    assert RunDir(tmp_path).read_config() == RunConfig()


def test_the_newest_state_replaces_the_older_one(run_dir):
    assert not run_dir.has_state()
    for step in (5, 12):
        run_dir.save_state(state(step))
    found = run_dir.load_state()
    assert (found.step, found.values) == (12, {"epoch": 12})
    assert found.tensors["method"]["w"].tolist() == [12.0, 12.0, 12.0]
    assert [path.name for path in (run_dir.path / "state").iterdir()] == ["step-000000012"]


def test_a_state_that_was_not_written_whole_is_not_taken(run_dir):
    run_dir.save_state(state(5))
    for name in ("step-000000009.tmp", "step-000000010"):
        (run_dir.path / "state" / name).mkdir()
    assert run_dir.load_state().step == 5


def test_without_a_state_the_error_says_how_to_start_over(run_dir):
    with pytest.raises(TrainError, match="has no saved state to resume from") as caught:
        run_dir.load_state()
    assert "--force" in caught.value.remedy


def test_a_broken_state_is_an_error_that_names_it(run_dir):
    run_dir.save_state(state(5))
    path = run_dir.path / "state" / "step-000000005" / "method.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(TrainError, match="cannot read the saved state .*step-000000005"):
        run_dir.load_state()


def test_no_run_at_a_path_is_an_error(tmp_path):
    with pytest.raises(TrainError, match="no run to resume at .*nowhere") as caught:
        RunDir(tmp_path / "nowhere").read_config()
    assert caught.value.remedy.startswith("--resume takes the run folder")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")])
def test_a_full_disk_is_explained_and_the_last_whole_state_stays(run_dir, monkeypatch, error):
    run_dir.save_state(state(5))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(TrainError, match="is full; the last whole state is kept") as caught:
        run_dir.save_state(state(9))
    assert f"declip pretrain --resume {run_dir.path}" in caught.value.remedy
    assert run_dir.load_state().step == 5
    assert [path.name for path in (run_dir.path / "state").iterdir()] == ["step-000000005"]
    monkeypatch.undo()
    run_dir.save_state(state(9))
    assert run_dir.load_state().step == 9


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainError, match="cannot write to"):
        RunDir(tmp_path / "file" / "run").create(RunConfig(), force=False)


def test_metrics_are_one_object_per_line(run_dir):
    for step in (10, 20, 30):
        run_dir.append_metrics({"step": step, "losses": {"clip": 1.5}})
    run_dir.forget_metrics_after(20)
    lines = (run_dir.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


@pytest.mark.parametrize("half", ['{"step": 30, "losses": {"clip"', '{"step": 30, "losses": {"clip": 1.5}'])
def test_a_line_that_was_not_written_whole_is_dropped(run_dir, half):
    run_dir.append_metrics({"step": 10})
    with (run_dir.path / "metrics.jsonl").open("a") as file:
        file.write(half)
    run_dir.forget_metrics_after(20)
    assert (run_dir.path / "metrics.jsonl").read_text() == '{"step": 10}\n'


def test_optimizers_go_on_from_flattened_tensors():
    def build():
        torch.manual_seed(0)
        first, second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        sgd = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        return (first, second), [torch.optim.AdamW(first.parameters(), lr=0.1), sgd]

    def step(modules, optimizers, seed):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        modules[1](modules[0](inputs)).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    whole, others = build(), build()
    for seed in range(3):
        step(*whole, seed)
    for module_, other in zip(whole[0], others[0], strict=True):
        other.load_state_dict(module_.state_dict())
    saved = {name: value.clone() for name, value in optimizer_tensors(whole[1]).items()}
    restore_optimizers(others[1], saved)
    for each in (whole, others):
        step(*each, 7)
    for module_, other in zip(whole[0], others[0], strict=True):
        assert torch.equal(module_.weight, other.weight)
