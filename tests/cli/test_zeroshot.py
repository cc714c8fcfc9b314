"""`declip zeroshot` as a user types it."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests import set_layouts
from tests.command_line import declip

run = partial(declip, "zeroshot")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    set_layouts.put_classes(tmp_path / "photos", ["red_panda", "cat", "house"], 2)
    return tmp_path / "photos"


def test_a_folder_gives_one_json_object(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--json", "--templates", "1")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dataset"] == str(photos)
    assert (report["num_images"], report["num_classes"], report["num_templates"]) == (6, 3, 1)
    assert "top5" not in report


def test_lines_are_the_default(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run)
    fields = dict(line.split("\t") for line in result.stdout.splitlines())
    assert fields["num_images"] == "6"
    assert fields["num_templates"] == "80"
    assert result.stderr == ""


def test_several_sets_share_one_model_and_give_a_list(photos: Path, tmp_path: Path, tiny_run: Path):
    set_layouts.mnist(tmp_path)
    predictions = tmp_path / "out.jsonl"
    result = run(photos, "mnist", "--model", tiny_run, "--data-root", tmp_path, "--predictions", predictions, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [entry["dataset"] for entry in report["results"]] == [str(photos), "mnist"]
    assert report["average_score"] == pytest.approx(sum(entry["score"] for entry in report["results"]) / 2)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["dataset"] for line in lines] == [str(photos)] * 6 + ["mnist"] * 3
    assert "9 predictions are in" in result.stderr


def test_report_adds_classes_and_confusions(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--report", "--json")
    report = json.loads(result.stdout)
    assert {entry["class"] for entry in report["per_class"]} == {"red panda", "cat", "house"}
    assert all(entry["class"] != entry["predicted"] for entry in report["confused"])


def test_unreadable_images_are_told_on_stderr(photos: Path, tiny_run: Path):
    (photos / "cat" / "broken.png").write_bytes(b"broken")
    result = run(photos, "--model", tiny_run, "--json")
    assert json.loads(result.stdout)["num_skipped"] == 1
    assert "skipped 1 images" in result.stderr
    assert "broken.png" in result.stderr


def test_features_that_cannot_be_kept_are_told_on_stderr(
    photos: Path, tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "file"))
    result = run(photos, "--model", tiny_run, "--json")
    assert result.exit_code == 0, result.output
    assert "features are computed and not kept" in result.stderr


def test_the_newest_run_is_used_and_named(photos: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DECLIP_RUNS", str(tiny_run.parent))
    result = run(photos, "--json")
    assert result.exit_code == 0
    assert str(tiny_run) in result.stderr


def test_without_a_model_the_error_says_how_to_get_one(photos: Path):
    result = run(photos)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no model found")
    assert "  fix: " in result.stderr


def test_without_a_data_set_it_is_a_wrong_usage():
    assert run().exit_code == 2
    result = run("--json")
    assert result.exit_code == 2
    assert result.stdout == ""


def test_class_names_fit_one_set_only(photos: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    result = run(photos, "demo", "--classes", tmp_path / "names.txt")
    assert result.exit_code == 1
    assert "names the classes of one data set (got 2)" in result.stderr


def test_a_retrieval_set_is_referred_to_its_command():
    result = run("flickr30k")
    assert result.exit_code == 1
    assert "fix: declip retrieve flickr30k" in result.stderr


def test_list_shows_every_set(tmp_path: Path):
    result = run("--list", "--data-root", tmp_path)
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0] == ["name", "task", "classes", "metric", "expected", "is_there"]
    path = str(tmp_path / "stanford_cars" / "devkit")
    assert ["cars", "zero-shot, linear-probe", "196", "accuracy", path, "no"] in rows
    assert ["coco", "retrieval", "-", "recall", str(tmp_path / "dataset_coco.json"), "no"] in rows
    listed = json.loads(run("--list", "--data-root", tmp_path, "--json").stdout)["datasets"]
    assert len(listed) == len(rows) - 1
    assert listed[-1]["task"] == "retrieval"
    assert listed[0]["name"] == "demo"
    assert listed[0]["is_there"] is True


def test_images_of_unknown_classes_get_a_row_each(photos: Path, tiny_run: Path):
    (photos / "broken.png").write_bytes(b"broken")
    result = run(photos, "--model", tiny_run, "--labels", "red panda,cat,house")
    assert result.exit_code == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(rows) == 6
    assert all(Path(path).is_file() and label in ("red panda", "cat", "house") for path, label, _ in rows)
    assert all(1 / 3 <= float(probability) <= 1 for _, _, probability in rows)
    assert "skipped 1 images, not an image" in result.stderr


def test_labels_of_a_file_for_paths_on_stdin_are_json(photos: Path, tiny_run: Path, tmp_path: Path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    paths = sorted(map(str, photos.glob("cat/*")))
    words = ("-", "--model", tiny_run, "--labels", tmp_path / "labels.txt", "--templates", "1", "--json")
    report = json.loads(run(*words, stdin="\n".join(paths)).stdout)
    assert [row["path"] for row in report["predictions"]] == paths
    assert report["predictions"][0].keys() == {"path", "label", "probability"}
    assert (report["labels"], report["num_images"]) == (["cat", "dog"], 2)


@pytest.mark.parametrize("more", [("--report",), ("--predictions", "x.jsonl"), ("--classes", "x.txt")])
def test_options_for_known_classes_are_refused_with_labels(photos: Path, tiny_run: Path, more):
    assert run(photos, "--model", tiny_run, "--labels", "cat,dog", *more).exit_code == 2


def test_stdin_needs_labels(tiny_run: Path):
    assert run("-", "--model", tiny_run).exit_code == 2


def test_a_page_of_the_scores_is_written(photos: Path, tmp_path: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--templates", "1", "--html", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    wrong = round(6 * (1 - json.loads(result.stdout)["top1"]))
    assert text.count("<img") >= wrong > 0
    assert "red panda" in text
    assert "the page is" in result.stderr
