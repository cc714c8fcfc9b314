import math
import os
import socket

import pytest
import torch

from declip_cli.config import ModelConfig, TrainConfig
from declip_cli.errors import TrainError
from declip_cli.interop.read import load_model
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import save_model
from declip_cli.model.clip import DualEncoder
from declip_cli.train import build, launch, loop
from declip_cli.train.build import count_cores, find_machine
from tests.train.small_runs import metrics, run, small_config


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as questions are concerned: `gpu(native_bf16=True, capability=(8, 0))`."""

    def pretend(*, native_bf16, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize(
    ("native_bf16", "capability", "expected"),
    [(True, (8, 0), "bf16"), (False, (7, 0), "fp16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")],
)
def test_auto_takes_the_fastest_format_that_a_gpu_has(native_bf16, capability, expected, gpu):
    gpu(native_bf16=native_bf16, capability=capability)
    machine = find_machine(small_config(train={"precision": "auto", "device": "auto", "threads": None}))
    assert (machine.device, machine.precision) == ("cuda", expected)


def test_processes_that_would_share_a_gpu_are_refused(gpu, monkeypatch):
    gpu(native_bf16=True, capability=(9, 0))
    monkeypatch.setattr(build, "world_size", lambda: 2)
    monkeypatch.setattr(build, "from_all", lambda value: [value, value])
    config = small_config(train={"device": "auto"})
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(TrainError, match="LOCAL_RANK is not set"):
        find_machine(config)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_machine(config).device == "cuda"


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(TrainError, match=r"fp16 needs a GPU \(found cpu\)"):
        find_machine(small_config(train={"precision": "fp16"}))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, 8),
        ({"device": "cpu"}, 1),
        ({"device": "cpu", "processes": 3}, 3),
        ({"device": "mps"}, 1),
        ({"processes": 2}, 2),
    ],
)
def test_one_process_is_started_for_each_gpu_that_is_used(train, expected, gpu):
    gpu(native_bf16=True, capability=(9, 0))
    assert launch.wanted_processes(TrainConfig(**train)) == expected


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        (range(16), [(HOST, list(range(16)))] * 8, 2),  # torchrun: all ranks of a node share its cores
        (
            range(16, 32),
            [(HOST, list(range(i * 16, i * 16 + 16))) for i in range(8)],
            16,
        ),  # srun has bound each to its own
        (range(16), [(HOST, list(range(16)))] * 2 + [("other", list(range(16)))] * 2, 8),
        (range(2), [(HOST, [0, 1])] * 8, 1),
    ],
)
def test_a_rank_counts_the_cores_that_it_really_has(mine, others, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(mine), raising=False)
    monkeypatch.setattr(build, "world_size", lambda: len(others))
    monkeypatch.setattr(build, "from_all", lambda value: others)
    assert count_cores() == expected


@pytest.mark.parametrize(("tf32", "expected"), [(True, "high"), (False, "highest")])
def test_float32_products_may_be_rounded_to_tf32_unless_told_otherwise(tf32, expected, tmp_path):
    try:
        run(small_config(train={"tf32": tf32, "steps": 1}, optim={"warmup_steps": 0}), tmp_path / "run")
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_is_an_error_that_names_the_remedy(error, tmp_path, monkeypatch):
    def full(training, learning_rate):
        raise error

    monkeypatch.setattr(loop, "take_step", full)
    with pytest.raises(TrainError, match="the memory of this cpu is not enough for 8 pairs at once") as caught:
        run(small_config(), tmp_path / "run")
    assert caught.value.remedy.startswith("--micro-batch-size 4, which changes no result")


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def wrong(training, learning_rate):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "take_step", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        run(small_config(), tmp_path / "run")


@pytest.mark.parametrize("method", ["clip", "filip"])
def test_the_logit_scale_that_is_trained_starts_where_it_is_told_and_is_the_one_reported(method, tmp_path):
    config = small_config(
        method={"name": method}, train={"steps": 4, "logit_scale_init": 1.5}, optim={"warmup_steps": 0}
    )
    run(config, tmp_path / "run")
    scales = [record["logit_scale"] for record in metrics(tmp_path / "run")]
    assert scales[0] == pytest.approx(torch.tensor(1.5).exp().item(), rel=0.01)
    assert len(set(scales)) >= 3  # the last step's rate is 0


def test_the_sigmoid_loss_learns_a_bias_that_is_reported_and_saved_with_the_model(tmp_path):
    config = small_config(method={"contrastive": "sigmoid"}, train={"steps": 4}, optim={"warmup_steps": 0})
    run(config, tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert records[0]["logit_bias"] == pytest.approx(-math.log(8), abs=0.01)  # of 8 pairs
    assert records[0]["logit_scale"] == pytest.approx(10, rel=0.01)
    assert len({record["logit_bias"] for record in records}) >= 3
    encoder = load_model(tmp_path / "run" / "model", option="--model").encoder
    assert encoder.logit_bias.item() == pytest.approx(records[-1]["logit_bias"])


def test_pixels_are_normalized_as_the_model_to_start_from_did_after_resuming_too(tmp_path):
    encoder = DualEncoder(find_architecture(ModelConfig(arch="test")))
    encoder.pixel_mean.fill_(1 / 3)
    save_model(encoder, tmp_path / "model", config=ModelConfig(arch="test"), method="clip")
    config = small_config(train={"init": str(tmp_path / "model"), "steps": 4}, optim={"warmup_steps": 0})
    run(config, tmp_path / "run")
    longer = small_config(train={"init": str(tmp_path / "model"), "steps": 6}, optim={"warmup_steps": 0})
    run(longer, tmp_path / "run", is_resumed=True)
    assert torch.equal(load_model(tmp_path / "run").encoder.pixel_mean, encoder.pixel_mean)


def test_a_model_with_another_activation_is_no_start(tmp_path):
    run(small_config(train={"steps": 1}, optim={"warmup_steps": 0}), tmp_path / "first")
    other = small_config(model={"quick_gelu": False}, train={"init": str(tmp_path / "first")})
    with pytest.raises(TrainError, match=r"the activation \(model\.quick_gelu\) differs"):
        run(other, tmp_path / "second")
