"""`declip linear-probe` as a user types it."""

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import declip

run = partial(declip, "linear-probe")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split, count in (("train", 5), ("test", 2)):
        for name, color in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), tuple(value + number for value in color)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_folder_gives_one_json_object(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["dataset"], report["num_train"], report["num_val"], report["num_test"]) == (str(photos), 8, 2, 4)
    assert report["top1"] == 1.0
    assert "held out" in result.stderr


def test_lines_are_the_default(photos: Path, tiny_run: Path):
    fields = dict(line.split("\t") for line in run(photos, "--model", tiny_run, "--shots", "1").stdout.splitlines())
    assert (fields["shots"], fields["num_train"]) == ("1", "2")


def test_baseline_is_scored_when_asked_for(photos: Path, tiny_run: Path):
    report = json.loads(run(photos, "--model", tiny_run, "--baseline", "--features", "post", "--json").stdout)
    assert report["features"] == "post"
    assert report["raw_pixels"]["top1"] == 1.0


def test_missing_split_is_an_error_with_a_fix(photos: Path, tiny_run: Path):
    result = run(photos / "train", "--model", tiny_run)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "has no split 'train' (found: none)" in result.stderr
    assert "\n  fix: " in result.stderr


def test_too_many_shots_are_told_with_the_class(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--shots", "9")
    assert result.exit_code == 1
    assert "--shots 9" in result.stderr
    assert "--shots 4 or fewer" in result.stderr


def test_unknown_features_are_wrong_usage(photos: Path, tiny_run: Path):
    assert run(photos, "--model", tiny_run, "--features", "middle").exit_code == 2


def test_a_page_of_the_scores_is_written(photos: Path, tiny_run: Path, tmp_path: Path):
    result = run(photos, "--model", tiny_run, "--html", tmp_path / "page.html", "--json")
    assert "predictions" not in json.loads(result.stdout)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There is no mistake." in text  # red and blue are told apart
    assert "100.0%" in text
