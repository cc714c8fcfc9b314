import dataclasses
import math

import pytest
import torch
from torch import nn

from declip_cli.train.health import StepReport, advice, broken_weights, spread
from tests.train.small_runs import resolved, small_config

WELL = {
    "step": 100,
    "total_steps": 1000,
    "samples_seen": 100 * 256,
    "wait_share": 0.1,
    "logit_scale": 20.0,
    "spread": {"image": 0.4, "text": 0.4},
    "losses": {"clip": 3.0, "total": 3.0},
    **dict.fromkeys(("seconds", "seconds_left", "step_seconds", "samples_per_second", "learning_rate"), 1.0),
    **dict.fromkeys(("gradient_norm", "loss_scale", "peak_memory_mib", "num_bad_steps"), 1.0),
}


def told(*, workers=8, context_length=32, smoothing=0.0, num_skipped=0, truncated_share=0.005, **changes):
    config = small_config(
        model={"context_length": context_length, "image_side_px": 224},
        method={"label_smoothing": smoothing},
        train={"batch_size": 256, "steps": 1000},
    )
    run = resolved(config)
    run = dataclasses.replace(run, machine=dataclasses.replace(run.machine, workers=workers, cores=8))
    return dict(advice(StepReport(**(WELL | changes)), run, num_skipped=num_skipped, truncated_share=truncated_share))


def test_a_run_that_does_well_is_told_nothing():
    assert told() == {}


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"wait_share": 0.4, "workers": 2}, "starved", ["40%", "2 loader threads", "--set data.workers=8"]),
        ({"wait_share": 0.4}, "starved", ["8 loader threads", "prepare with --image-side-px 256"]),
        ({"truncated_share": 0.3}, "cut", ["30% of the captions", "the 32 tokens", "--set model.context_length=77"]),
        ({"truncated_share": 0.3, "context_length": 77}, "cut", ["the 77 tokens", "put what matters first"]),
        ({"spread": {"image": 0.001, "text": 0.4}}, "collapsed image", ["spread 0.001", "--learning-rate"]),
        ({"spread": {"image": 0.4, "text": 0.0}}, "collapsed text", ["text features", "--batch-size"]),
        ({"losses": {"clip": 5.54}}, "chance", ["5.540", "5.545", "--learning-rate"]),
        ({"logit_scale": 100.0}, "scale", ["at its bound (100.0)"]),
        ({"num_skipped": 3}, "bad 100", ["3 batches before step 100", "skipped"]),
    ],
)
def test_what_is_wrong_is_one_line_with_what_to_do(changes, kind, words):
    found = told(**changes)
    assert list(found) == [kind]
    assert "\n" not in found[kind]
    for word in words:
        assert word in found[kind]


@pytest.mark.parametrize("changes", [{"spread": {"image": 0.0}}, {"losses": {"clip": 5.545}}, {"logit_scale": 100.0}])
def test_a_run_that_is_warming_up_is_given_time(changes):
    assert told(samples_seen=2 * 256, **changes) == {}


@pytest.mark.parametrize("changes", [{"losses": {}}, {"losses": {"clip": 5.545}, "smoothing": 0.1}])
def test_the_loss_is_not_compared_with_chance_where_that_says_nothing(changes):
    assert told(**changes) == {}


def test_the_spread_is_the_mean_squared_distance_of_unit_features_from_their_mean():
    embeds = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in embeds.tolist()]
    mean = [sum(column) / 7 for column in zip(*units, strict=True)]
    expected = sum(sum((x - m) ** 2 for x, m in zip(row, mean, strict=True)) for row in units) / 7
    assert spread(embeds).item() == pytest.approx(expected, rel=1e-5)
    assert spread(torch.ones(4, 3)).item() == pytest.approx(0.0, abs=1e-6)
    assert spread(torch.eye(4)).item() == pytest.approx(0.75)


def test_the_first_broken_weight_is_named():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert broken_weights(module) == ""
    module[1].running_var[0] = float("inf")
    assert broken_weights(module) == "1.running_var"
