import errno
import json
import shutil

import pytest
import torch

from declip_cli.errors import TrainError
from declip_cli.files import check_folder
from declip_cli.train import run_dir as module
from declip_cli.train.run_dir import RunDir, SavedState, default_run_dir
from tests.train.small_runs import resolved, small_config

RUN = resolved()
OTHER = resolved(small_config(train={"steps": 7}))


def state(step):
    return SavedState(step=step, tensors={"method": {"w": torch.full((3,), float(step))}}, values={"epoch": step})


def create(run_dir, run, *, force=False):
    with run_dir.locked():
        run_dir.claim(force=force)
        run_dir.write_run(run)


@pytest.fixture
def run_dir(tmp_path):
    made = RunDir(tmp_path / "run")
    create(made, RUN)
    made.given = []
    made.log = made.given.append
    return made


def save(run_dir, *steps, keep=2):
    for step in steps:
        run_dir.save_state(state(step), RUN, keep=keep)


def test_the_configuration_is_read_back_and_names_the_versions(run_dir):
    assert run_dir.read_run() == RUN
    content = json.loads((run_dir.path / "config.json").read_text())
    assert {"torch", "declip", "python", "accelerate"} <= set(content["versions"])


def test_a_run_is_named_by_method_architecture_and_time(tmp_path):
    assert default_run_dir(tmp_path, method="slip", arch="rn50").name.startswith("slip-rn50-20")


def test_a_folder_with_files_is_not_overwritten(run_dir):
    run_dir.append_log("started")
    with pytest.raises(TrainError, match="already holds files") as caught:
        create(run_dir, OTHER)
    assert f"--resume {run_dir.path}" in caught.value.remedy
    assert "--force" in caught.value.remedy
    save(run_dir, 3)
    create(run_dir, OTHER, force=True)
    assert not run_dir.has_state()
    assert run_dir.read_run() == OTHER


def test_force_does_not_delete_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(TrainError, match="is not a run folder, so --force does not delete it"):
        create(RunDir(tmp_path), OTHER, force=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"dear"


def test_the_folder_of_a_run_that_could_not_start_can_be_used_again(run_dir):
    create(run_dir, OTHER)
    assert run_dir.read_run() == OTHER


def test_an_empty_folder_can_be_used(tmp_path):
    create(RunDir(tmp_path), OTHER)
    assert RunDir(tmp_path).read_run() == OTHER


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept(run_dir, keep):
    assert not run_dir.has_state()
    save(run_dir, 5, 12, 13, 20, keep=keep)
    found = run_dir.load_state()
    assert (found.step, found.values) == (20, {"epoch": 20})
    assert found.tensors["method"]["w"].tolist() == [20.0, 20.0, 20.0]
    names = [f"step-{step:09d}" for step in (5, 12, 13, 20)]
    assert sorted(path.name for path in (run_dir.path / "state").iterdir()) == names[-keep:]
    for name in names[-keep:]:
        check_folder(run_dir.path / "state" / name)


def test_an_earlier_state_can_be_asked_for(run_dir):
    save(run_dir, 5, 12)
    assert run_dir.load_state(before=12).step == 5
    with pytest.raises(TrainError, match="has no saved state"):
        run_dir.load_state(before=5)


def test_a_state_that_was_not_written_whole_is_not_taken(run_dir):
    save(run_dir, 5)
    for name in ("step-000000009.tmp", "step-000000010"):
        (run_dir.path / "state" / name).mkdir()
    assert run_dir.load_state().step == 5


def test_without_a_state_the_error_says_how_to_start_over(run_dir):
    with pytest.raises(TrainError, match="has no saved state to resume from") as caught:
        run_dir.load_state()
    assert "--config" in caught.value.remedy


FILES = ("method.safetensors", "state.json", "config.json", "SHA256SUMS")


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(run_dir, name, damage):
    save(run_dir, 5, 12)
    damage(run_dir.path / "state" / "step-000000012" / name)
    if name == "state.json" and not (run_dir.path / "state" / "step-000000012" / name).exists():
        assert run_dir.load_state().step == 5  # not a state any more
        return
    assert run_dir.load_state().step == 5
    (given,) = run_dir.given
    assert given.startswith(f"note: the saved state {run_dir.path / 'state' / 'step-000000012'} is damaged (")
    assert given.endswith("; resuming from step-000000005 instead")


def test_a_list_of_digests_that_was_cut_at_a_line_vouches_for_nothing(run_dir):
    save(run_dir, 5, 12)
    sums = run_dir.path / "state" / "step-000000012" / "SHA256SUMS"
    sums.write_bytes(sums.read_bytes().split(b"\n")[0] + b"\n")
    assert run_dir.load_state().step == 5
    assert "is not listed in SHA256SUMS" in run_dir.given[0]


def test_if_all_states_are_damaged_the_error_names_them(run_dir):
    save(run_dir, 5, 12)
    for step in ("step-000000005", "step-000000012"):
        flip(run_dir.path / "state" / step / "method.safetensors")
    with pytest.raises(TrainError, match="step-000000012 is damaged .*step-000000005 is damaged") as caught:
        run_dir.load_state()
    assert "--config" in caught.value.remedy


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
def test_damaged_settings_are_taken_from_the_newest_state(run_dir, damage):
    save(run_dir, 5)
    path = run_dir.path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"batch_size": 8', '"batch_size": 9')) if damage is flip else damage(path)
    assert run_dir.read_run() == RUN
    assert "config.json is damaged" in run_dir.given[0]
    assert run_dir.given[0].endswith("taken from step-000000005 instead")


def test_settings_that_were_edited_are_refused_and_the_error_says_what_to_do(run_dir):
    path = run_dir.path / "config.json"
    path.write_text(path.read_text().replace('"weight_decay": 0.1', '"weight_decay": 0.2'))
    with pytest.raises(TrainError, match="it was changed after it was written: pass changes as options instead"):
        run_dir.read_run()


def test_two_processes_do_not_write_to_one_folder(run_dir):
    refused = pytest.raises(TrainError, match="another process is training in")
    with run_dir.locked(), refused, RunDir(run_dir.path).locked():
        pass
    with run_dir.locked():
        run_dir.claim(force=True)  # even then the folder stays this process's
        with refused, RunDir(run_dir.path).locked():
            pass
        run_dir.write_run(RUN)
    with run_dir.locked():
        pass


def test_no_run_at_a_path_is_an_error(tmp_path):
    with pytest.raises(TrainError, match="no run to resume at .*nowhere") as caught:
        RunDir(tmp_path / "nowhere").read_run()
    assert caught.value.remedy.startswith("--resume takes the run folder")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")])
def test_a_full_disk_is_explained_and_the_last_whole_state_stays(run_dir, monkeypatch, error):
    save(run_dir, 5)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        TrainError, match=r"is full: a file could not be written; the last whole state is kept \(step-000000005\)"
    ) as caught:
        save(run_dir, 9)
    assert f"declip pretrain --resume {run_dir.path}" in caught.value.remedy
    assert run_dir.load_state().step == 5
    assert [path.name for path in (run_dir.path / "state").iterdir()] == ["step-000000005"]
    monkeypatch.undo()
    save(run_dir, 9)
    assert run_dir.load_state().step == 9


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainError, match="cannot write to"):
        create(RunDir(tmp_path / "file" / "run"), OTHER)


def test_free_space_is_looked_at_before_a_state_is_written(run_dir, monkeypatch):
    save(run_dir, 5, 12)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    large = SavedState(step=20, tensors={"method": {"w": torch.zeros(2**18)}}, values={})
    with pytest.raises(TrainError, match=r"is full: a state takes 1 MiB; the last whole state is kept \(step-0*12\)"):
        run_dir.save_state(large, RUN, keep=2)
    assert run_dir.load_state().step == 12
    assert run_dir.load_state(before=12).step == 5  # it would not have made enough room


def test_an_older_state_goes_where_that_makes_room(run_dir, monkeypatch):
    save(run_dir, 5, 12)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        patch.setattr(module, "_HEADROOM", 1.0)
        run_dir._make_room(12)  # bytes; step 5 takes more
    assert [path.name for path in (run_dir.path / "state").iterdir()] == ["step-000000012"]


def test_a_full_disk_before_the_first_state_does_not_speak_of_one(run_dir, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(TrainError, match="no state is saved yet"):
        save(run_dir, 20)


def test_the_best_score_is_read_back_only_for_its_own_kind(run_dir):
    assert run_dir.read_best("demo.top1") is None
    run_dir.write_best(key="demo.top1", score=0.25, step=7)
    assert (run_dir.read_best("demo.top1"), run_dir.read_best("demo.top5")) == (0.25, None)
    (run_dir.path / "best.json").write_text("[" * 50_000)
    assert run_dir.read_best("demo.top1") is None


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


@pytest.mark.parametrize("line", [b"\xff\xfe", b"{}", b"3", b"[" * 50_000, b'{"step": "x"}', b""])
def test_a_damaged_line_is_dropped_and_said(run_dir, line):
    for step in (10, 20):
        run_dir.append_metrics({"step": step})
    path = run_dir.path / "metrics.jsonl"
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, line, second, b""]))
    run_dir.forget_metrics_after(20)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'
    assert run_dir.given == [f"note: 1 damaged lines of {path} are dropped"]
