"""Two processes: the recorded numbers in the faithful mode, one process's numbers in the default mode."""

import os
import signal
import threading
import time

import pytest
import torch

from declip_cli.config import TrainConfig
from declip_cli.errors import TrainError
from declip_cli.interop.original import rename_original
from declip_cli.train.launch import RankFailed, start_processes, wanted_processes
from tests.golden_files import golden_case, golden_cases, load_golden
from tests.train.ranks import batch_norm_step, fail_on_rank_one, run, step, wait_for_the_end

pytestmark = pytest.mark.usefixtures("quick_ranks")

METHODS = ("clip", "slip", "filip", "declip", "defilip")
RECORDED = golden_cases(world=2, methods=METHODS)
ADDED = [
    ("rocket", {}),
    ("aclip", {}),
    ("declip", {"weights": {"simsiam": 0.0, "simclr": 0.2}}),
    *((name, {"weights": {"words": 1.0}}) for name in ("clip", "slip", "declip")),
]
RESNET = golden_case("clip", arch="rn")
JOBS = [
    *(
        (name, {"faithful": True, **({"weights": {"clip": 1e-12}} if name.startswith("filip") else {})})
        for name in RECORDED
    ),
    (RESNET, {"faithful": False}),
    *((name, {}) for name in METHODS),
    *((name, {"micro_batch_size": 3}) for name in METHODS),
    *((name, {"micro_batch_size": 3, "contrastive": "sigmoid"}) for name in ("clip", "declip")),
    ("declip", {"micro_batch_size": 3, "positives": "caption", "captions": 3}),
    *((name, options | more) for name, options in ADDED for more in ({}, {"micro_batch_size": 3})),
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, quick_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(run, (JOBS, str(folder)), num_processes=2)

    def load(job, rank):
        name = job if isinstance(job, str) else JOBS.index(job)
        return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)

    return load


@pytest.mark.parametrize("job", JOBS[: len(RECORDED)], ids=lambda job: job[0])
def test_faithful_ranks_equal_the_recording(two_ranks, job):
    found, meta = two_ranks(job, 0), load_golden(job[0]).meta
    for name, value in meta["components"].items():
        if name != "clip_pairs":
            assert found[f"term/{name}"].item() == pytest.approx(value, rel=1e-4), name
    assert found["term/total"].item() == pytest.approx(meta["total"], rel=1e-4)
    for name, norm in meta["grad_norms"].items():
        gradient = found[f"grad/{rename_original(name)}"]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    if "queue" in found:
        recorded = torch.from_numpy(load_golden(job[0]).arrays["bank_after"]).T
        torch.testing.assert_close(found["queue"], recorded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("job", JOBS[len(RECORDED) :], ids=lambda job: f"{job[0]}-{len(job[1])}")
def test_two_ranks_of_half_a_batch_equal_one_of_the_whole(two_ranks, job):
    name, options = job
    # A deep ReLU network with BatchNorm over 8 images magnifies rounding: pixels changed by 1e-7 already change
    # its gradients by 2e-3. Its BatchNorm across ranks is checked tightly on its own below.
    allowed = 1e-2 if name == RESNET else 1e-4
    alone = step(name, rank=0, num_ranks=1, **{key: options[key] for key in options if key != "micro_batch_size"})
    for rank in (0, 1):
        found = two_ranks(job, rank)
        assert set(found) == set(alone)
        for key, value in alone.items():
            size = value.float().norm()
            # Biases before a BatchNorm have zero gradient; what is found there is rounding noise.
            noise = 1e-5 if size < 1e-5 else 1e-6
            assert (found[key] - value).float().norm() < allowed * size + noise, (key, rank)


def test_batch_norm_over_two_ranks_equals_the_library_on_the_whole_batch(two_ranks):
    whole = batch_norm_step(torch.nn.BatchNorm2d(3), slice(None))
    halves = [two_ranks("batch_norm", rank) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([half["out"] for half in halves]), whole["out"])
    torch.testing.assert_close(torch.cat([half["input"] for half in halves]), whole["input"])
    torch.testing.assert_close(halves[0]["weight"] + halves[1]["weight"], whole["weight"])
    torch.testing.assert_close(halves[1]["mean"], whole["mean"])
    torch.testing.assert_close(halves[1]["var"], whole["var"])


def test_a_failing_rank_ends_all_of_them_and_rank_0_says_why(tmp_path):
    began = time.monotonic()
    with pytest.raises(RankFailed):
        start_processes(fail_on_rank_one, (str(tmp_path / "told"),), num_processes=2)
    assert time.monotonic() - began < 60
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["error: process 1 of 2 has failed: the second process cannot go on", "  fix: mend it"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_is_passed_on_to_every_rank(number, tmp_path):
    def ask():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    assert start_processes(wait_for_the_end, (str(tmp_path),), num_processes=2) == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tasks_of_srun_without_ranks_are_told_to_use_torchrun(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(TrainError, match="srun has started 4 tasks without ranks") as caught:
        wanted_processes(TrainConfig())
    assert "torchrun" in caught.value.remedy
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert wanted_processes(TrainConfig(device="cpu")) == 1
