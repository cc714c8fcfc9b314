"""From a folder of images to scores, through the commands a user types."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests import command_line

COLORS = {"red": (200, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square")


def declip(*words):
    result = command_line.declip(*words)
    assert result.exit_code == 0, result.stderr
    return result


def report_of(*words):
    stdout = declip(*words, "--json").stdout
    assert len(stdout.splitlines()) == 1
    return json.loads(stdout)


def draw(path, color, shape, seed):
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (48, 40), tuple(rng.integers(220, 256, 3).tolist()))
    x, y = rng.integers(2, 16, 2).tolist()
    draw_shape = ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle
    draw_shape((x, y, x + 22, y + 22), fill=COLORS[color])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """32 made-up pairs: every color and shape four times."""
    folder, lines = tmp_path_factory.mktemp("pairs") / "photos", []
    for number in range(32):
        color, shape = list(COLORS)[number % 4], SHAPES[number // 4 % 2]
        draw(folder / f"{number}.png", color, shape, number)
        lines.append({"file": f"{number}.png", "caption": f"a {color} {shape}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def run(pairs):
    """Prepare the pairs and train on them for 20 steps."""
    shards, out = pairs.parent / "shards", pairs.parent / "run"
    prepared = report_of("prepare", pairs, "--out", shards, "--image-side-px", 36, "--workers", 1)
    assert (prepared["num_read"], prepared["num_pairs"], prepared["num_skipped"]) == (32, 32, 0)
    words = ["--data", shards, "--arch", "vit-tiny32", "--method", "clip", "--steps", 20, "--batch-size", 32]
    words += ["--precision", "fp32", "--threads", 1, "--set", "train.log_every_steps=1", "--set", "data.workers=0"]
    report = report_of("pretrain", *words, "--set", "optim.warmup_steps=2", "--out", out)
    assert (report["steps"], report["samples_seen"]) == (20, 640)
    return out


@pytest.fixture(scope="module")
def classes(pairs):
    """Images of each color that were not trained on, one folder per class, in three parts."""
    folder = pairs.parent / "classes"
    for part, start in (("train", 100), ("val", 200), ("test", 300)):
        for number in range(16):
            color = list(COLORS)[number % 4]
            draw(folder / part / color / f"{number}.png", color, SHAPES[number // 4 % 2], start + number)
    return folder


def test_the_loss_falls(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["losses"]["total"] for line in lines]
    assert len(losses) == 20
    # At first nothing is told apart: log 32 = 3.47. At the end images of eight kinds, four of each: log 4 = 1.39.
    assert losses[0] == pytest.approx(np.log(32), abs=0.5)
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    assert np.mean(losses[-3:]) > np.log(4) - 0.05


def test_zero_shot_tells_the_colors_apart(run, classes):
    report = report_of("zeroshot", classes / "test", "--model", run, "--templates", 1, "--threads", 1)
    assert (report["num_images"], report["num_classes"], report["num_templates"]) == (16, 4, 1)
    assert {"dataset", "model", "metric", "top1", "mean_per_class", "seconds"} <= set(report)
    assert report["top1"] >= 0.5  # chance: 0.25
    assert "top5" not in report


def test_the_linear_probe_finds_the_colors(run, classes):
    report = report_of("linear-probe", classes, "--model", run, "--threads", 1)
    assert (report["num_train"], report["num_val"], report["num_test"], report["num_classes"]) == (16, 16, 16, 4)
    assert {"dataset", "model", "feature_dim", "l2", "val_accuracy", "metric", "mean_per_class", "seconds"} <= set(
        report
    )
    assert report["top1"] >= 0.5


def test_retrieval_scores_both_directions(run, pairs):
    report = report_of("retrieve", pairs, "--model", run, "--threads", 1)
    assert (report["num_images"], report["num_texts"]) == (32, 32)
    for direction in ("image_to_text", "text_to_image"):
        assert {"recall_at_1", "recall_at_5", "recall_at_10", "median_rank"} <= set(report[direction])
        assert report[direction]["recall_at_10"] >= 0.5  # chance: 0.31
    assert report["rsum"] > 0


def test_a_search_finds_images_by_words(run, pairs):
    report = report_of("retrieve", pairs, "--query", "a red circle", "-k", 3, "--model", run, "--threads", 1)
    assert report["query"] == "a red circle"
    assert report["num_indexed"] == 32
    assert [hit["rank"] for hit in report["hits"]] == [1, 2, 3]
    assert all(hit["path"].endswith(".png") for hit in report["hits"])


def test_the_newest_run_is_used_and_named_when_no_model_is_given(run, classes, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "runs" / "only")
    monkeypatch.setenv("DECLIP_RUNS", str(tmp_path / "runs"))
    result = declip("zeroshot", classes / "test", "--templates", 1, "--threads", 1)
    assert f"model: {tmp_path / 'runs' / 'only'}" in result.stderr
    assert "top1\t" in result.stdout
