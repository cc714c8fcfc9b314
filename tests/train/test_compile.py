"""Steps compiled: traced as for any backend, run by the plainest one; when that is done, and how often."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from declip_cli.errors import TrainError
from declip_cli.train import compiled
from declip_cli.train.compiled import (
    Compilation,
    compile_method,
    compiling_explained,
    has_steady_memory,
    is_compiled,
)
from declip_cli.train.grad_cache import forward_backward
from tests.methods.small_methods import build
from tests.methods.test_steady_shapes import batch_of
from tests.train.small_runs import resolved, run, small_config

USED = {
    "clip": {"images", "texts"},
    "slip": {"images", "texts", "image_features"},
    "filip": {"image_tokens", "text_tokens"},
    "declip": {"images", "texts", "mlm_losses"},
    "defilip": {"images", "texts", "mlm_losses", "image_tokens", "text_tokens"},
    "rocket": {"images", "texts", "image_features", "text_features"},
    "aclip": {"images", "texts", "image_features"},
}
"""What the losses of each method read, by their papers."""


@pytest.fixture
def _plain_backend(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", USED)
def test_the_graph_ends_at_what_the_losses_read(name):
    method = build(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert compiled._find_used(method) == USED[name]
    assert compiled._find_used(build(name, weights={"words": 1.0})) == USED[name] | {"word_losses"}
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.usefixtures("_plain_backend")
def test_a_compiled_embed_is_one_graph_with_the_losses_and_gradients_of_the_plain_one():
    results = []
    for is_asked in (False, True):
        method = build("filip", weights={"words": 0.5})
        if is_asked:
            compile_method(method)
        for lengths in ((9, 3, 4, 7), (3, 4, 6, 8)):
            batch = batch_of(lengths, side=16)
            result = forward_backward(method, batch, micro_batch_size=0, autocast=nullcontext)
        results.append((result.terms.total, {key: p.grad for key, p in method.named_parameters()}))
    (expected, wanted), (total, found) = results
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in wanted.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("_plain_backend")
def test_a_resumed_run_compiles_once_for_each_pass_whatever_captions_come_and_whoever_scores_it(tmp_path):
    def evaluate(model):  # sees other numbers of images and texts
        model.encoder.encode_image(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
        model.encoder.encode_text(torch.full((5, 7), 49407))
        return {"x": {"y": 0.0}}

    method = {"name": "declip"}
    train = {"batch_size": 8, "micro_batch_size": 4, "eval": "demo", "eval_every_steps": 2}
    losses = []
    for is_asked in (False, True):
        first, whole = (
            small_config(method=method, train=train | {"steps": steps, "compile": is_asked and steps > 3})
            for steps in (3, 8)
        )
        run(first, tmp_path / f"{is_asked}")
        reports = run(whole, tmp_path / f"{is_asked}", is_resumed=True, evaluate=evaluate)
        losses.append([report.losses["total"] for report in reports if report.losses])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def run_of(device="cuda", world_size=1, **train):
    plain = resolved(small_config(train={"compile": "auto", "batch_size": 8, "steps": 1000} | train))
    machine = replace(plain.machine, device=device, world_size=world_size)
    return replace(plain, machine=machine)


@pytest.mark.parametrize(
    ("asked", "expected", "words"),
    [
        ({"device": "cpu"}, False, "not compiled: train.compile = auto does that on GPUs only (this is cpu)"),
        ({"device": "cpu", "compile": True}, True, "compiled, as asked (train.compile = true)"),
        ({"compile": False}, False, "not compiled, as asked (train.compile = false)"),
        ({"time_limit_s": 3600.0}, False, "not compiled: the time limit is not over an hour"),
        ({"time_limit_s": 3601.0}, None, "compiled after a few steps, if the rest is found to take over an hour"),
        ({}, None, "compiled after a few steps, if the rest is found to take over an hour"),
    ],
)
def test_whether_to_compile_is_known_before_or_left_open(asked, expected, words, monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    verdict, reason = is_compiled(run_of(**asked))
    assert verdict is expected
    assert reason.startswith(words)


def test_without_triton_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert is_compiled(run_of()) == (False, "not compiled: Triton is not installed")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, True),
        ({"micro_batch_size": 8}, True),
        ({"micro_batch_size": 4}, False),
        ({"world_size": 2}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_graphs_are_replayed_on_one_gpu_with_whole_batches_only(asked, expected):
    assert has_steady_memory(run_of(**asked)) is expected


@pytest.fixture
def compilations(monkeypatch):
    """What has been compiled, and with which options."""
    done = []
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled, "compile_method", lambda method, **options: done.append((method, options)))
    return done


def decide(compilation, report, *, step_s, steps=(10, 20, 30)):
    """Give reports of steps of 8 pairs, the first ten of which took a minute; return what was said."""
    given = []
    for step in steps:
        times = {"step_seconds": 60 + step_s * (step - 10), "seconds": 600 + step_s * step}
        given += compilation.decide(replace(report, step=step, samples_seen=8 * step, **times)).advice
    return given


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run(small_config(train={"steps": 1}), tmp_path_factory.mktemp("run"))[-1]


@pytest.mark.parametrize(
    ("step_s", "limit_s", "expected"),
    [
        (3.7, None, "compiled from here on: the rest of the run takes 60 minutes as it is (train.compile = auto)"),
        (3.6, None, "not compiled: the rest of the run takes 59 minutes as it is (train.compile = auto)"),
        (8.0, 4000.0, "not compiled: the rest of the run takes 54 minutes as it is (train.compile = auto)"),
    ],
)  # 1,000 − 20 steps are left; of the limit, 4,000 − 600 − 160 s
def test_a_run_is_compiled_where_what_is_left_takes_over_an_hour(step_s, limit_s, expected, compilations, report):
    compilation = Compilation("method", run_of(time_limit_s=limit_s))
    assert compilations == []
    assert decide(compilation, report, step_s=step_s) == [expected]
    assert compilations == ([("method", {})] if expected.startswith("compiled") else [])


def test_a_run_that_is_asked_to_compiles_at_once_and_says_nothing_later(compilations, report):
    compilation = Compilation("method", run_of(compile=True))
    assert compilations == [("method", {"with_graphs": True})]
    assert decide(compilation, report, step_s=100.0) == []
    assert len(compilations) == 1


def test_steps_that_start_slowly_are_not_measured(compilations, report):
    assert decide(Compilation("method", run_of()), report, step_s=9.0, steps=(10, 15, 19)) == []


def test_on_several_ranks_each_tower_is_compiled_by_itself(monkeypatch):
    monkeypatch.setattr(compiled, "world_size", lambda: 2)
    method, compiled_ones = build("clip"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled_ones.append((self, options)))
    compile_method(method)
    options = {"dynamic": False}
    assert compiled_ones == [(method.encoder.visual, options), (method.encoder.text.transformer, options)]


def test_a_step_that_cannot_be_compiled_is_an_error_with_a_way_out():
    from torch._dynamo.exc import BackendCompilerFailed

    with pytest.raises(TrainError, match="PyTorch cannot compile a step") as caught, compiling_explained():
        raise BackendCompilerFailed(lambda: None, ValueError("no compiler"), None)
    assert caught.value.remedy == "--set train.compile=false"
    with pytest.raises(RuntimeError, match="other"), compiling_explained():
        raise RuntimeError("other")
