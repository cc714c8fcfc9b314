import argparse
import importlib
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        names = ("summary", "rows", "corpus", "cell")
        found = {name: importlib.import_module(f"data_efficiency_{name}") for name in names}
        yield found | {"script": importlib.import_module("data_efficiency")}
    finally:
        sys.path.pop(0)


def line(row, pairs, seed, score, *, in_time=None, digest="a"):
    def snapshot(value):
        names = "zeroshot_top1 zeroshot_top5 image_to_text_r10 text_to_image_r10 probe_top1 raw_pixels_top1"
        return {"scores": dict.fromkeys(names.split(), value)}

    facts = {"row": row, "pairs": pairs, "size": pairs / 800, "seed": seed, "digest": digest, "num_trials": 8}
    other = None if in_time is None else snapshot(in_time)
    return facts | {"best": snapshot(score), "equal_time": other, "seconds": 10.0, "has_stopped_rising": True}


def test_the_standard_error_is_that_of_the_mean_of_a_sample(parts):
    assert parts["summary"].standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert parts["summary"].standard_error([1.0]) is None


def test_differences_are_paired_by_the_seeds_that_both_have(parts):
    mean, error = parts["summary"].paired_difference({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 4.0, 9: 0.0})
    assert (mean, error) == (2.0, pytest.approx(1.0))  # of 1 and 3
    assert parts["summary"].paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("score", "expected"),
    [(0.2, ("=", 200)), (0.15, ("=", 100 * math.sqrt(2))), (0.05, ("<", 100)), (0.5, (">", 400)), (0.4, ("=", 400))],
)
def test_pairs_are_interpolated_in_their_logarithm_and_bounded_outside(score, expected, parts):
    sign, pairs = parts["summary"].pairs_needed({100: 0.1, 200: 0.2, 400: 0.4}, score)
    assert (sign, pairs) == (expected[0], pytest.approx(expected[1]))


def test_a_row_that_needs_half_the_pairs_has_a_factor_of_two(parts):
    # Scores rise by 0.1 when the pairs double; ours is 0.1 ahead.
    clip, ours = {100: 0.1, 200: 0.2, 400: 0.3}, {100: 0.2, 200: 0.3, 400: 0.4}
    found = [parts["summary"].saving(clip, ours, pairs) for pairs in (100, 200, 400)]
    assert found == [("=", pytest.approx(2.0)), ("=", pytest.approx(2.0)), (">", 1.0)]


def test_a_summary_compares_with_clip_and_with_the_best_rival(parts):
    lines = [line("clip", 100, seed, 0.1, in_time=0.1) for seed in (0, 1)]
    lines += [line("slip", 100, seed, 0.3) for seed in (0, 1)]
    lines += [line("declip", 100, 0, 0.9), line("declip", 100, 0, 0.4, in_time=0.2), line("declip", 100, 1, 0.6)]
    summary = parts["summary"].summarize(lines)
    one = next(entry for entry in summary["best"]["zeroshot_top1"] if entry["row"] == "declip")
    assert (one["num_seeds"], one["rival"]) == (2, "slip")  # the cell that was run again counts once
    assert (one["mean"], one["error"]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert one["minus_clip"] == (pytest.approx(0.4), pytest.approx(0.1))
    assert one["minus_rival"] == (pytest.approx(0.2), pytest.approx(0.1))
    assert one["factor_rival"] is None  # one size of SLIP makes no curve
    in_time = {entry["row"]: entry["mean"] for entry in summary["equal_time"]["zeroshot_top1"]}
    assert in_time == {"clip": 0.1, "declip": 0.2}
    assert "| row | 100 pairs |\n|---|---|\n| clip | 10.0 ± 0.0 |\n| slip |" in parts["summary"].overview(summary)
    text = parts["summary"].table(summary | {"other_limits": {}})
    assert "| declip | 100 | 2 | 50.0 ± 10.0 | +40.0 ± 10.0 | slip | +20.0 ± 10.0 | – | – |" in text


def test_a_factor_comes_with_those_of_the_seeds(parts):
    lines = [line("clip", n, seed, 0.001 * n) for n in (100, 200, 400) for seed in (0, 1)]
    lines += [line("small", 100, 0, 0.1), line("small", 100, 1, 0.3)]
    summary = parts["summary"].summarize(lines)
    one = next(entry for entry in summary["best"]["zeroshot_top1"] if entry["row"] == "small")
    assert one["factor_clip"] == ("=", pytest.approx(2.0))
    assert one["factors_clip"] == [("=", pytest.approx(1.0)), ("=", pytest.approx(2 * 2**0.5))]
    text = parts["summary"].table(summary | {"other_limits": {}})
    assert "| 2.00 (1.00, 2.83) | 2.00 |" in text
    assert "## All rows, 100 pairs" in parts["summary"].overview(summary)


def test_runs_with_other_limits_have_a_table_of_their_own(parts):
    short, long = {"max_steps": 600}, {"max_steps": 1200}
    lines = [line("clip", 100, seed, 0.1) | {"limits": short} for seed in (0, 1)]
    lines += [line("clip", 100, seed, 0.2) | {"limits": long} for seed in (0, 1)]
    lines += [line("slip", 100, seed, 0.5) | {"limits": long} for seed in (0, 1)]
    summary = parts["summary"].summarize_all(lines, short)
    assert [(one["row"], one["mean"]) for one in summary["best"]["zeroshot_top1"]] == [("clip", 0.1)]
    others = summary["other_limits"][1200]["best"]["zeroshot_top1"]
    assert [(one["row"], one["mean"]) for one in others] == [("clip", 0.2), ("slip", 0.5)]


def test_an_ablation_compares_each_row_with_the_one_before(parts):
    rows = parts["rows"].ABLATION
    lines = [line(row, 100, seed, 0.1 * n + 0.01 * seed) for n, row in enumerate(rows) for seed in (0, 1)]
    lines += [line(row, 200, 0, 0.5) for row in rows[1:]]  # not all of them
    found = parts["summary"].summarize(lines)["ablation"]
    assert {(one["pairs"], one["row"]) for one in found} == {(100, row) for row in rows}
    assert [one["mean"] for one in found[:5]] == pytest.approx([0.005, 0.105, 0.205, 0.305, 0.405])
    assert [one["minus_before"] for one in found[:2]] == [None, (pytest.approx(0.1), pytest.approx(0.0))]
    assert parts["summary"].summarize(lines[:-1][:8])["ablation"] == []


def test_smaller_shares_of_the_pairs_lie_in_the_larger_ones(parts):
    keys = [str(number) for number in range(80)]
    found = parts["corpus"].nested_parts(keys, seed=0)
    assert [len(part) for part in found] == [10, 10, 20, 40]
    assert sorted(number for part in found for number in part) == list(range(80))
    assert found != parts["corpus"].nested_parts(keys, seed=1)


def test_near_duplicates_differ_in_at_most_four_bits(parts):
    assert parts["corpus"].near_duplicates([0b1111, 0b11111 << 50, 0], [1 << 63, 0]) == [False, False, False]
    assert parts["corpus"].near_duplicates([(1 << 63) | 0b111, 0b11111], [1 << 63, 0b1]) == [True, True]


def test_all_rows_come_at_one_size_and_seed_before_the_next(parts):
    found = list(parts["script"].cells_of(["slip", "clip"], [0.125, 0.5], [0, 1]))
    of_seed_0 = [("slip", 0.5, 0), ("clip", 0.5, 0), ("slip", 0.125, 0), ("clip", 0.125, 0)]
    assert found == of_seed_0 + [(row, size, 1) for row, size, _ in of_seed_0]


def test_jobs_run_in_order_and_a_later_one_sees_what_earlier_ones_found(parts):
    found = []
    script = parts["script"]
    jobs = (script.Job({"n": n}, partial(int, n + len(found))) for n in range(3))
    options = argparse.Namespace(processes=1, is_over=lambda: False)
    with ThreadPoolExecutor(1) as pool:
        for job, number in script.run_all(pool, jobs, options):
            found.append((job.key["n"], number))
    assert found == [(0, 0), (1, 2), (2, 4)]


def test_no_job_starts_after_the_time(parts):
    script = parts["script"]
    options = argparse.Namespace(processes=1, is_over=lambda: True)
    with ThreadPoolExecutor(1) as pool:
        assert list(script.run_all(pool, iter([script.Job({}, int)]), options)) == []


def test_a_line_that_a_kill_cut_off_is_run_again(parts, tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert parts["script"].read_lines(path) == [{"a": 1}]
    parts["script"].append_line(path, {"a": 2})
    assert parts["script"].read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_trial_draws_the_same_for_all_rows_and_the_first_is_the_rows_own(parts):
    rows = parts["rows"]
    assert rows.draw("slip", 0, rows.weights_of("slip")) == {}
    clip, slip = (rows.draw(row, 3, rows.weights_of(row)) for row in ("clip", "slip"))
    weights = slip.pop("method.weights")
    assert clip == slip
    assert weights["clip"] == 1.0
    assert 0.5 <= weights["simclr"] <= 2


def test_settings_of_equal_budget_win(parts, tmp_path):
    def trial(row, number, validation):
        return {"row": row, "trial": number, "validation": validation, "settings": {"n": number}}

    lines = [trial("clip", 0, 0.1), trial("clip", 1, 0.3), trial("clip", 2, 0.9), trial("slip", 0, 0.2)]
    parts["script"].write_tuned(tmp_path, [*lines, trial("slip", 1, 0.2)], ["clip", "slip"])
    parts["script"].write_tuned(tmp_path, [*lines, trial("rocket", 0, 0.1)], ["rocket"])  # clip and slip keep theirs
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert found["clip"] == {"settings": {"n": 1}, "validation": 0.3, "num_trials": 2}
    assert found["slip"]["settings"] == {"n": 0}
    assert found["rocket"]["num_trials"] == 1


def test_a_run_keeps_its_best_model_and_the_best_in_the_time_of_another(parts):
    scores, now = iter([0.1, 0.3, 0.2, 0.4]), iter([0, 10, 100, 110, 200, 210, 300, 310, 400])
    watch = parts["cell"].Watch(lambda model: next(scores), 5, 25.0, lambda: next(now))
    watch.start()
    for model in "abcd":
        watch(model)
    assert watch.curve == [(5, 10, 0.1), (10, 20, 0.3), (15, 30, 0.2), (20, 40, 0.4)]  # scoring took no time
    assert (watch.best.model, watch.best_in_time.model, watch.num_since_best) == ("d", "b", 0)


@pytest.mark.parametrize("row", ["clip", "clip-plain", "slip", "declip", "declip-paper"])
def test_a_row_keeps_its_rate_to_the_end(row, parts):
    asked = parts["rows"].resolve(row, {"optim.learning_rate_peak": 2e-3})
    assert asked.optim.learning_rate_end == asked.optim.learning_rate_peak == 2e-3


def test_the_page_lists_what_each_trial_scored(parts):
    def trial(row, number, settings):
        return {"row": row, "trial": number, "validation": 0.1 + number / 100, "seconds": 60.2, "settings": settings}

    weights = {"method.weights": {"clip": 1.0, "simclr": 0.5, "mlm": 0.0}}
    lines = [trial("clip", 0, {}), trial("small", 0, {}), trial("small", 1, weights)]
    decay = {"optim.weight_decay": 0.3}
    text = parts["summary"].choices([*lines, trial("clip", 2, decay), trial("small", 2, decay | weights)])
    assert "| trial | clip | small |" in text
    assert "| 1 | – | 11.0 (60 s) |" in text
    assert "* 1: small (1 clip + 0.5 simclr)\n* 2: clip, small (1 clip + 0.5 simclr): weight_decay 0.3\n" in text
    assert parts["summary"].choices([]) == ""
