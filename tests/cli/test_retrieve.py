"""`declip retrieve` as a user types it."""

import json
import threading
import urllib.request
from functools import partial
from pathlib import Path

import fsspec
import pytest

from declip_cli.serve.server import SearchServer
from tests.command_line import declip

run = partial(declip, "retrieve")


@pytest.fixture
def photos(tmp_path: Path, make_image) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(make_image(number))
        lines.append(json.dumps({"file": f"{number}.jpg", "captions": [f"image {number}", f"number {number}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_folder_with_captions_is_scored(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["dataset"], report["num_images"], report["num_texts"]) == (str(photos), 6, 12)
    assert 0 < report["rsum"] <= 6


def test_scores_are_lines_by_default(photos: Path, tiny_run: Path):
    fields = dict(line.split("\t") for line in run(photos, "--model", tiny_run).stdout.splitlines())
    assert {"image_to_text.recall_at_1", "text_to_image.median_rank", "rsum"} <= fields.keys()


def test_search_gives_a_json_object_with_hits(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--query", "a bus", "-k", "2", "--json")
    report = json.loads(result.stdout)
    assert [hit["rank"] for hit in report["hits"]] == [1, 2]
    assert report["hits"][0].keys() == {"rank", "score", "path", "caption"}
    assert (report["query"], report["num_indexed"]) == ("a bus", 6)
    assert result.stderr == ""


def test_search_prints_a_line_per_hit_best_first(photos: Path, tiny_run: Path):
    lines = run(photos, "--model", tiny_run, "--query", "a bus").stdout.splitlines()
    cells = [line.split("\t") for line in lines]
    assert len(cells) == 6
    assert all(Path(path).is_file() and caption.startswith("image") for path, _, caption in cells)
    assert [float(score) for _, score, _ in cells] == sorted((float(score) for _, score, _ in cells), reverse=True)


def test_more_hits_than_images_are_told(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--query", "a bus", "-k", "9")
    assert "6 hits, as many as there are images (asked for 9)" in result.stderr


def test_paths_come_from_stdin(photos: Path, tiny_run: Path):
    stdin = f"{photos / '0.jpg'}\n{photos / '3.jpg'}\n{photos / 'gone.jpg'}\n"
    result = run("-", "--model", tiny_run, "--query-image", photos / "3.jpg", "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["hits"][0]["path"] == str(photos / "3.jpg")
    assert report["skipped"]["missing file"]["count"] == 1
    assert "gone.jpg" in result.stderr


def test_saved_index_grows_and_is_a_source_of_its_own(photos: Path, tiny_run: Path, tmp_path: Path, make_image):
    index = tmp_path / "index"
    words = ("--model", tiny_run, "--query", "a bus", "--json")
    first = json.loads(run(photos, *words, "--index-dir", index, "--index", "HNSW8").stdout)
    (photos / "6.jpg").write_bytes(make_image(6))
    second = json.loads(run(photos, *words, "--index-dir", index).stdout)
    alone = json.loads(run(index, *words).stdout)
    assert (first["num_added"], second["num_added"], second["num_encoded"]) == (6, 1, 1)
    assert first["index"] == second["index"] == alone["index"] == "HNSW8"
    assert alone["num_indexed"] == 7
    assert alone["hits"] == second["hits"]


def test_gallery_is_written(photos: Path, tiny_run: Path, tmp_path: Path):
    result = run(photos, "--model", tiny_run, "--query", "a bus", "--html", tmp_path / "hits.html")
    assert result.exit_code == 0
    assert str(tmp_path / "hits.html") in result.stderr
    assert (tmp_path / "hits.html").read_text().count("<li>") == 6


@pytest.mark.parametrize(
    "option", [("--index", "HNSW8"), ("--index-dir", "x"), ("--html", "x.html"), ("--minus", "x"), ("--within", "x")]
)
def test_options_of_a_search_are_refused_without_a_query(photos: Path, tiny_run: Path, option):
    result = run(photos, "--model", tiny_run, *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_stdin_without_a_query_is_wrong_usage(tiny_run: Path):
    assert run("-", "--model", tiny_run).exit_code == 2


def test_texts_an_image_and_what_is_not_wanted_are_one_query(photos: Path, tiny_run: Path):
    queries = ("--query", "a bus", "--query", "rain", "--query-image", photos / "0.jpg", "--minus", "night")
    report = json.loads(run(photos, "--model", tiny_run, *queries, "--json").stdout)
    assert report["query"] == f"{photos / '0.jpg'} + a bus + rain - night"
    assert len(report["hits"]) == 6


def test_the_address_of_the_page_is_the_result_and_ctrl_c_its_usual_end(photos: Path, tiny_run: Path, monkeypatch):
    seen = []

    def serve(server):
        with urllib.request.urlopen(f"{server.address}page.css") as response:
            seen.append(response.read())

    def serve_until_interrupted(server):
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        server.handle_request()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(SearchServer, "serve_forever", serve_until_interrupted)
    result = run(photos, "--model", tiny_run, "--serve", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["address"].startswith("http://127.0.0.1:")
    assert seen


@pytest.mark.parametrize("option", [("--query", "x"), ("--minus", "x"), ("--html", "x.html"), ("--within", "x")])
def test_queries_are_for_the_page_where_it_is_served(photos: Path, tiny_run: Path, option):
    result = run(photos, "--model", tiny_run, "--serve", *option)
    assert result.exit_code == 2
    assert "from the page" in result.stderr


def test_only_a_folder_or_pattern_is_searched(photos: Path, tiny_run: Path):
    result = run(photos, "--model", tiny_run, "--query", "a bus", "--within", "[0-2].jpg", "--json")
    report = json.loads(result.stdout)
    assert sorted(Path(hit["path"]).name for hit in report["hits"]) == ["0.jpg", "1.jpg", "2.jpg"]
    assert (report["num_indexed"], report["num_within"]) == (6, 3)
    none = run(photos, "--model", tiny_run, "--query", "a bus", "--within", "elsewhere")
    assert none.exit_code == 1
    assert "has a path like 'elsewhere'" in none.stderr


def test_missing_folder_is_an_error_with_a_fix(tiny_run: Path):
    result = run("nowhere", "--model", tiny_run, "--query", "x")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no data set, folder or shard named 'nowhere'")
    assert "\n  fix: " in result.stderr


@pytest.mark.parametrize("query", ["", "  "])
def test_empty_query_is_told_and_nothing_is_scored(photos: Path, tiny_run: Path, query: str):
    result = run(photos, "--model", tiny_run, "--query", query)
    assert result.exit_code == 2
    assert "--query is empty" in result.stderr
    assert result.stdout == ""


def test_a_hit_is_one_line_of_cells_whatever_its_caption_and_name_hold(tmp_path: Path, tiny_run: Path, make_image):
    caption = "a\tb\nc\x1b]0;title\x07\u202e" + "x" * 5000
    (tmp_path / "a\tb\n.jpg").write_bytes(make_image(0))
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a\tb\n.jpg", "caption": caption}))
    words = (tmp_path, "--model", tiny_run, "--query", "a bus", "-k", "1")
    path, _, shown = run(*words).stdout.removesuffix("\n").split("\t")
    assert path == str(tmp_path / r"a\tb\n.jpg")
    assert shown.startswith(r"a b c\x1b]0;title\x07\u202exxx")
    assert shown.endswith("x…")
    assert json.loads(run(*words, "--json").stdout)["hits"][0]["caption"] == " ".join(caption.split())


def test_images_in_a_store_are_read_from_there(photos: Path, tiny_run: Path):
    store = fsspec.filesystem("memory")
    store.put(str(photos), "/far/photos", recursive=True)
    try:
        result = run("memory://far/photos", "--model", tiny_run, "--query", "a bus", "-k", "2", "--json")
        report = json.loads(result.stdout)
        assert report["num_indexed"] == len([path for path in photos.rglob("*") if path.suffix in (".jpg", ".png")])
        assert all(hit["path"].startswith("memory://far/photos/") for hit in report["hits"])
        assert "skipped" not in report
    finally:
        store.rm("/far", recursive=True)


def test_the_demo_is_searched_and_shown(tmp_path: Path, tiny_run: Path):
    page = tmp_path / "hits.html"
    result = run("demo", "--model", tiny_run, "--query", "guitar", "-k", "2", "--html", page)
    paths = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert len(paths) == 2
    assert all(path.startswith("twitter/") for path in paths)
    assert page.read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 2
