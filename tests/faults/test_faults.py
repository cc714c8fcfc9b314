"""Short form of the fault tests; the long one is `python -m tests.faults.long`."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from declip_cli.errors import DeclipError, TrainError
from declip_cli.train import loop
from declip_cli.train.run_dir import RunDir
from tests.faults.corruption import read_everything, tried
from tests.faults.harness import WAYS, Case, final_state, killed_until_done, start, undisturbed, wait
from tests.train.small_runs import run, small_config

# Each way once; the long form has every method in each.
CASES = [Case(method, way) for method, way in zip(("defilip", "slip", "declip"), WAYS, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}, {case.way}")
def test_a_run_that_is_killed_ends_as_one_that_is_not(case, tmp_path):
    seconds = undisturbed(case, tmp_path / "whole")
    killed_until_done(case, tmp_path / "killed", random.Random(case.method), seconds=seconds, max_kills=1)
    (step, found), (expected_step, expected) = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert step == expected_step == case.steps
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_when_a_rank_is_killed_the_other_ends_too(tmp_path):
    case = Case("declip", "two processes", steps=100_000)
    ids = start(case, tmp_path / "run", is_resumed=False)
    while not (tmp_path / "run" / "state").exists():
        time.sleep(0.02)
    os.kill(ids[1], signal.SIGKILL)
    began = time.monotonic()
    assert wait(ids) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    log = (tmp_path / "run.log").read_text()
    assert "process 1 of 2 has failed" in log or "another process has disappeared" in log


def test_damaged_files_are_noticed_and_passed_over(tmp_path):
    path = tmp_path / "run"
    run(
        small_config(method={"name": "declip", "queue_size": 40}, train={"steps": 4, "checkpoint_every_steps": 2}), path
    )
    assert tried(path, random.Random(0), number=6) == {"traceback": 0, "unnoticed": 0, "other values": 0}
    assert read_everything(path) is not None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_what_was_saved_stays_good(small_disk, tmp_path):
    config = small_config(train={"steps": 6, "checkpoint_every_steps": 2})
    (small_disk / "ballast").write_bytes(bytes(2**20))
    with pytest.raises(TrainError, match=r"is full: .*no state is saved yet") as caught:
        run(config, small_disk / "run")
    assert "free some space" in caught.value.remedy
    assert not list(small_disk.rglob("*.tmp"))


def test_a_folder_that_is_removed_ends_the_run(tmp_path, monkeypatch):
    step = loop.take_step

    def removed(training, rate):
        if training.step == 3:
            shutil.rmtree(tmp_path / "run")
        return step(training, rate)

    monkeypatch.setattr(loop, "take_step", removed)
    with pytest.raises(DeclipError, match="cannot write to"):
        run(small_config(), tmp_path / "run")


def test_of_two_writers_the_second_is_refused(tmp_path):
    case = Case("clip", "plain", steps=100_000)
    (first,) = start(case, tmp_path / "run", is_resumed=False)
    while not RunDir(tmp_path / "run").has_state():
        time.sleep(0.02)
    with pytest.raises(TrainError, match="another process is training in"):
        run(case.config(), tmp_path / "run", is_resumed=True)
    os.kill(first, signal.SIGTERM)
    assert wait([first]) == [0]
