"""Metadata written to do harm, or damaged: each counts as one bad record, and the rest is prepared."""

import io
import json
import tarfile

import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.retrieve import read_pairs
from declip_cli.files import parse_json

DEEP = "[" * 50_000
NOT_JSON = (DEEP, '{"file": "1.jpg", "caption": ' + DEEP, '{"a":' * 50_000, "9" * 5000)
NOT_TEXT = (
    '{"file": "1.jpg", "caption": ' + "[" * 900 + "1" + "]" * 900 + "}",
    '{"file": "2.jpg", "caption": 1e999}',
    '{"file": "3.jpg", "caption": ["a", ["b"]]}',
)
NO_FILE = ('{"file": "a\\u0000b.jpg", "caption": "a zero byte"}', '{"file": "\\ud800.jpg", "caption": "half a pair"}')
GOOD = '{"file": "0.jpg", "caption": "good"}'


def run(source, out, kind=""):
    *_, report = prepare(PrepareConfig(source=str(source), out=str(out), kind=kind, max_bad=1.0, workers=2))
    return report


@pytest.mark.parametrize("text", [*NOT_JSON[:3], b"\xff", "", "{"])
def test_what_is_no_json_is_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("kind", ["captions", "table"])
def test_hostile_lines_of_a_list_are_counted_and_the_rest_is_prepared(tmp_path, make_image, kind):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.jpg").write_bytes(make_image(number))
    (photos / "captions.jsonl").write_text("\n".join((GOOD, *NOT_JSON, *NOT_TEXT, *NO_FILE)))
    report = run(photos if kind == "captions" else photos / "captions.jsonl", tmp_path / "out", kind)
    assert report.num_pairs == 1
    counts = {cause: count for cause, (count, _) in report.skipped.items()}
    assert counts == {"damaged line": 4, "caption not text": 3, "missing file": 2}


def test_a_search_and_a_score_read_past_hostile_lines(tmp_path, make_image):
    (tmp_path / "0.jpg").write_bytes(make_image(0))
    (tmp_path / "captions.jsonl").write_text("\n".join((*NOT_JSON, *NOT_TEXT, GOOD)))
    opened = open_dataset(str(tmp_path))
    assert [opened.captions(number) for number in range(len(opened))] == [("good",)]
    assert {cause: count for cause, (count, _) in opened.skipped.items()} == {"damaged line": 4, "caption not text": 3}


def test_hostile_metadata_in_a_tar_are_counted_and_the_rest_is_read(tmp_path, make_image):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, line in enumerate((GOOD, *NOT_JSON, *NOT_TEXT)):
            for name, data in ((f"{number}.jpg", make_image(number)), (f"{number}.json", line.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = run(tmp_path / "a.tar", tmp_path / "out")
    assert report.num_pairs == 1
    assert {cause: count for cause, (count, _) in report.skipped.items()} == {
        "damaged metadata": 4,
        "caption not text": 3,
    }
    assert read_pairs(open_dataset(str(tmp_path / "a.tar"))).texts == ["good"]


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        '{"images": ' + DEEP,
        '{"images": [1]}',
        '{"images": {"file_name": "0.jpg"}}',
        '{"images": [{"file_name": "0.jpg", "id": 1}], "annotations": [3]}',
        '{"images": [{"file_name": "0.jpg", "id": [1]}], "annotations": [{"image_id": [2], "caption": "a"}]}',
        '{"images": [{"filename": "0.jpg", "sentences": 5}, {"filename": ["0.jpg"], "split": []}]}',
        '{"images": [{"filename": "0.jpg", "split": "test", "sentences": [3]}]}',
    ],
)
def test_a_hostile_list_of_coco_is_an_error_with_a_remedy(tmp_path, make_image, content):
    (tmp_path / "0.jpg").write_bytes(make_image(0))
    (tmp_path / "dataset_coco.json").write_text(content)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "dataset_coco.json", tmp_path / "out", "coco")
    assert caught.value.remedy
    with pytest.raises((DataError, EvaluateError), match="coco") as scored:
        read_pairs(open_dataset("coco", data_root=tmp_path))
    assert scored.value.remedy


def test_a_damaged_progress_file_does_not_pass_for_one_of_this_command(tmp_path, make_image):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(make_image(0))
    (tmp_path / "photos" / "0.txt").write_text("good")
    (tmp_path / "out").mkdir()
    for content in (DEEP, json.dumps([1]), "{"):
        (tmp_path / "out" / "progress.json").write_text(content)
        with pytest.raises(DataError, match="holds an interrupted run of another command"):
            run(tmp_path / "photos", tmp_path / "out")
