import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.pipeline import prepare
from tests.command_line import declip

declip_prepare = partial(declip, "prepare")


@pytest.fixture
def photos(tmp_path, make_image):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(make_image(number))
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


def test_json_has_the_promised_fields_and_stdout_nothing_else(photos, tmp_path):
    (photos / "6.jpg").write_bytes(b"")
    (photos / "6.txt").write_text("an empty file")
    result = declip_prepare(photos, "--out", tmp_path / "out", "--json", "--max-bad", "0.5")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["out"] == str(tmp_path / "out")
    assert report["num_read"] == 7
    assert report["num_pairs"] == 6
    assert report["num_shards"] == 1
    assert report["num_skipped"] == 1
    assert report["skipped"] == {"empty file": {"count": 1, "first": "6.jpg"}}
    assert report["seconds"] >= 0
    assert "skipped 1: empty file (first: 6.jpg)" in result.stderr


def test_without_json_there_are_key_tab_value_lines(photos, tmp_path):
    result = declip_prepare(photos, "--out", tmp_path / "out")
    assert "num_pairs\t6" in result.stdout.splitlines()


def test_run_again_it_says_that_it_is_done(photos, tmp_path):
    declip_prepare(photos, "--out", tmp_path / "out")
    result = declip_prepare(photos, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["was_there"] is True
    assert "--force prepares it again" in result.stderr


def test_a_wrong_column_name_lists_the_columns_there_are(photos, tmp_path):
    table = photos / "list.csv"
    table.write_text("picture,words\n0.jpg,hello\n")
    result = declip_prepare(table, "--out", tmp_path / "out", "--image-column", "img")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "has no column 'img' (it has: picture, words)" in result.stderr
    assert "fix: --image-column" in result.stderr
    result = declip_prepare(
        table, "--out", tmp_path / "out", "--image-column", "picture", "--caption-column", "words", "--json"
    )
    assert json.loads(result.stdout)["num_pairs"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "val"), "--split wants NAME=FRACTION (got 'val')"),
        (("--max-caption-chars", "0"), "--max-caption-chars must be at least 1 (got 0)"),
        (("--quality", "101"), "--quality is in [1, 100] (got 101)"),
    ],
)
def test_wrong_values_are_errors_with_a_remedy(photos, tmp_path, words, message):
    result = declip_prepare(photos, "--out", tmp_path / "out", *words)
    assert result.exit_code == 1
    assert f"error: {message}" in result.stderr
    assert "\n  fix: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--kind", "zip"), ("--duplicates", "some"), ("--engine", "spark")])
def test_a_wrong_choice_exits_with_2_and_names_the_choices(photos, tmp_path, words):
    result = declip_prepare(photos, "--out", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert f"'{words[1]}' is not one of" in result.stderr


def test_usage_errors_exit_with_2():
    assert declip_prepare("--out").exit_code == 2
    assert declip_prepare("photos").exit_code == 2


def test_ctrl_c_leaves_a_state_from_which_the_command_goes_on(tmp_path, make_image):
    source = tmp_path / "photos"
    source.mkdir()
    image = make_image(1, width=700, height=600)
    lines = [json.dumps({"file": f"{number}.jpg", "caption": f"image {number}"}) for number in range(240)]
    (source / "captions.jsonl").write_text("\n".join(lines))
    for number in range(240):
        (source / f"{number}.jpg").write_bytes(image)
    command = [sys.executable, "-m", "declip_cli", "prepare", str(source), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--shard-samples", "20", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while not (tmp_path / "out" / "00000.tar").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stdout == ""
    assert "run the same command again to continue" in stderr
    partial = len(open_dataset(str(tmp_path / "out")))
    assert partial % 20 == 0
    assert partial >= 20
    result = declip_prepare(source, "--out", tmp_path / "out", "--shard-samples", "20", "--json")
    assert json.loads(result.stdout)["num_pairs"] == 240
    assert len(open_dataset(str(tmp_path / "out"))) == 240


def test_filters_and_parts_are_options(photos, tmp_path):
    result = declip_prepare(
        photos, "--out", tmp_path / "out", "--min-caption-chars", 5, "--max-caption-chars", 50, "--script", "latin",
        "--max-caption-repeats", 3, "--min-side-px", 10, "--max-aspect", 4, "--duplicates", "near",
        "--exclude", photos, "--split", "val=0.2", "--json",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "no image-text pair found" in result.stderr
    assert "excluded image: 6, first 0.jpg" in result.stderr


def test_defaults_of_the_options_are_those_of_the_configuration(photos, tmp_path):
    assert declip_prepare(photos, "--out", tmp_path / "out").exit_code == 0
    *_, report = prepare(PrepareConfig(source=str(photos), out=str(tmp_path / "out")))
    assert report.was_there  # would be refused as another command if an option had another default


def test_the_help_is_complete_without_torch():
    result = declip_prepare("--help")
    assert "Example" in result.stdout
    program = "import sys; import declip_cli.cli.prepare; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
