"""What a report says, with a clock that stands still unless it is told to go."""

import time
from types import SimpleNamespace

import pytest
import torch

from declip_cli.batch import LossTerms
from declip_cli.methods.base import embeddings_of
from declip_cli.train import meter as module
from declip_cli.train.meter import Meter, StepOutcome
from declip_cli.train.optim import Schedule
from tests.train.small_runs import resolved, small_config


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=0.0, backlog=0.0)

    def drain(self):
        now.time += now.backlog
        now.backlog = 0.0

    monkeypatch.setattr(time, "monotonic", lambda: now.time)
    monkeypatch.setattr(Meter, "_wait_for_device", drain)
    return now


@pytest.fixture
def training():
    run = resolved(small_config(train={"log_every_steps": 1}))
    return SimpleNamespace(
        run=run,
        config=run.config,
        accelerator=SimpleNamespace(scaler=None, device=torch.device("cpu")),
        method=SimpleNamespace(
            logit_scale_in_use=lambda: torch.tensor(2.0),
            encoder=SimpleNamespace(logit_bias=None),
            views=SimpleNamespace(texts=("plain",)),
        ),
        stream=SimpleNamespace(wait_seconds=0.0, skipped={}, num_truncated_captions=0),
        schedule=Schedule(start=0.0, peak=1.0, end=0.0, first=16, warmup=32, total=160),
        logit_scale_bounds=(0.0, 4.6),
        step=0,
        total_steps=10,
        samples_seen=0,
        seconds=0.0,
        startup_seconds=0.0,
        step_seconds=0.0,
        bad_steps=torch.zeros(2, dtype=torch.int64),
    )


def take(training, meter, clock, *, seconds, loss=1.0, norm=1.0, backlog=0.0):
    """Let a step pass: so long on the host, and so much left to do on the device."""
    clock.time += seconds
    clock.backlog += backlog
    training.step += 1
    training.samples_seen += 16
    good = torch.tensor(norm).isfinite()
    value = torch.tensor(loss)
    embeds = torch.eye(4)[:, None]
    meter.add(
        StepOutcome(
            terms=LossTerms(total=value, terms={"clip": value}),
            embeddings=embeddings_of(
                SimpleNamespace(pair_indices=torch.arange(4), caption_ids=None), images=embeds, texts=embeds
            ),
            gradient_norm=torch.tensor(norm),
            is_good=good,
            is_bad=~good,
        )
    )


def report(meter):
    return meter.report(learning_rate=0.1, share=0.5, evaluations={})


def test_the_device_has_finished_before_the_clock_is_read(training, clock):
    meter = Meter(training)
    take(training, meter, clock, seconds=1.0)
    report(meter)
    take(training, meter, clock, seconds=1.0, backlog=3.0)
    assert report(meter).samples_per_second == pytest.approx(16 / 4)
    take(training, meter, clock, seconds=1.0)
    assert report(meter).samples_per_second == pytest.approx(16)


def test_evaluating_and_saving_are_no_training(training, clock):
    meter = Meter(training)
    take(training, meter, clock, seconds=1.0)
    report(meter)
    take(training, meter, clock, seconds=1.0, backlog=1.0)
    training.stream.wait_seconds += 1.0
    with meter.paused():
        clock.time += 100.0
    found = report(meter)
    assert (found.samples_per_second, found.wait_share) == (pytest.approx(16 / 2), pytest.approx(0.5))
    assert (found.seconds, found.step_seconds) == (pytest.approx(103.0), pytest.approx(3.0))


def test_losses_and_norms_are_those_of_the_good_steps(training, clock):
    meter = Meter(training)
    for loss, norm in ((1.0, 2.0), (float("nan"), float("nan")), (4.0, 7.0), (3.0, float("inf"))):
        take(training, meter, clock, seconds=1.0, loss=loss, norm=norm)
    found = report(meter)
    assert found.losses == {"clip": pytest.approx(2.5), "total": pytest.approx(2.5)}
    assert (found.gradient_norm, found.num_bad_steps) == (7.0, 2)
    assert found.advice[0] == "2 batches before step 4 had a broken gradient and were skipped"
    assert report(meter).losses == {}


def test_only_broken_batches_in_a_row_are_a_problem(training, clock):
    meter = Meter(training)
    allowed = training.config.train.max_bad_steps
    for number in range(3 * allowed):
        take(training, meter, clock, seconds=1.0, norm=float("nan") if number % allowed else 1.0)
        assert meter.problem() == ""
    take(training, meter, clock, seconds=1.0, norm=float("nan"))
    assert meter.problem() == f"{allowed} batches in a row had a broken gradient, up to step {3 * allowed + 1}"


def test_an_advice_is_given_once(training, clock):
    meter = Meter(training)
    advice = []
    for _ in range(8):
        take(training, meter, clock, seconds=1.0)
        training.stream.wait_seconds += 0.9
        advice.append(report(meter).advice)
    assert sum(len(sentences) for sentences in advice) == 1
    assert advice[2][0].startswith("waiting for data 90% of the time with 0 loader threads: --set data.workers=1")


def test_a_report_has_the_memory_of_the_process(training, clock):
    meter = Meter(training)
    take(training, meter, clock, seconds=1.0)
    assert 50 < report(meter).peak_memory_mib < 100_000
    assert module._peak_memory_mib(torch.device("cpu")) > 50
