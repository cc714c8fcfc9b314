"""Search finds what the features say, by text and by picture, with and without a saved index."""

from pathlib import Path

import numpy as np
import pytest

from declip_cli.data.catalogue import open_dataset
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.search import Query, search
from declip_cli.evaluate.texts import text_features

FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")


@pytest.fixture
def photos(tmp_path: Path, make_picture) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.jpg").write_bytes(make_picture(number))
    return folder


def test_hits_are_the_nearest_pictures_by_cosine(photos, tiny_model):
    listed = open_dataset(str(photos))
    report = search(tiny_model, listed, Query(text="a red bus"), k=5, options=FRESH)
    images = image_features(tiny_model, listed, options=FRESH).features
    cosines = (images @ text_features(tiny_model, ["a red bus"], options=FRESH)[0]).numpy()
    order = np.argsort(-cosines, kind="stable")[:5]
    assert [hit.path for hit in report.hits] == [listed.key(number) for number in order]
    assert [hit.score for hit in report.hits] == pytest.approx(cosines[order], abs=1e-5)
    assert [hit.rank for hit in report.hits] == [1, 2, 3, 4, 5]
    assert report.num_indexed == 12


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_token_model"])
def test_picture_finds_itself_first(photos, kind, request):
    model = request.getfixturevalue(kind)
    report = search(model, open_dataset(str(photos)), Query(image=photos / "07.jpg"), k=3, options=FRESH)
    assert report.hits[0].path.endswith("07.jpg")
    assert report.hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert report.query == str(photos / "07.jpg")


def test_token_wise_model_scores_a_text_by_its_tokens_best_patches(photos, tiny_token_model):
    report = search(tiny_token_model, open_dataset(str(photos)), Query(text="a bus"), k=12, options=FRESH)
    scores = [hit.score for hit in report.hits]
    assert len(scores) == 12
    assert scores == sorted(scores, reverse=True)


def test_token_wise_model_takes_no_index(photos, tiny_token_model, tmp_path):
    listed = open_dataset(str(photos))
    with pytest.raises(EvaluateError, match="--index HNSW8 needs one vector per image"):
        search(tiny_token_model, listed, Query(text="x"), index="HNSW8", options=FRESH)
    with pytest.raises(EvaluateError, match="--index-dir needs one vector per image"):
        search(tiny_token_model, listed, Query(text="x"), folder=tmp_path / "index", options=FRESH)


def test_saved_index_gives_the_same_hits_and_tells_what_changed(photos, tiny_model, tmp_path, make_picture):
    listed = open_dataset(str(photos))
    plain = search(tiny_model, listed, Query(text="a red bus"), k=4, options=FRESH)
    folder = tmp_path / "index"
    saved = search(tiny_model, listed, Query(text="a red bus"), folder=folder, k=4, options=FRESH)
    assert [hit.path for hit in saved.hits] == [hit.path for hit in plain.hits]
    assert [hit.score for hit in saved.hits] == pytest.approx([hit.score for hit in plain.hits], abs=1e-5)
    assert saved.to_json()["num_added"] == 12
    (photos / "12.jpg").write_bytes(make_picture(12))
    again = search(
        tiny_model, open_dataset(str(photos)), Query(image=photos / "12.jpg"), folder=folder, k=1, options=FRESH
    )
    assert again.hits[0].path.endswith("12.jpg")
    assert (again.changes["num_added"], again.changes["num_encoded"]) == (1, 1)


def test_saved_index_is_searched_without_its_pictures(photos, tiny_model, tmp_path):
    listed = open_dataset(str(photos))
    first = search(tiny_model, listed, Query(text="x"), folder=tmp_path / "index", options=FRESH)
    alone = search(tiny_model, None, Query(text="x"), folder=tmp_path / "index", options=FRESH)
    assert [hit.path for hit in alone.hits] == [hit.path for hit in first.hits]
    assert alone.changes == {}
    assert alone.hits[0].read() == Path(alone.hits[0].path).read_bytes()


def test_unreadable_pictures_are_counted(photos, tiny_model):
    (photos / "03.jpg").write_bytes(b"junk")
    report = search(tiny_model, open_dataset(str(photos)), Query(text="x"), k=20, options=FRESH).to_json()
    assert len(report["hits"]) == report["num_indexed"] == 11
    assert report["num_skipped"] == 1


def test_unreadable_query_picture_is_an_error(photos, tiny_model, tmp_path):
    (tmp_path / "query.jpg").write_bytes(b"junk")
    with pytest.raises(EvaluateError, match="query.jpg"):
        search(tiny_model, open_dataset(str(photos)), Query(image=tmp_path / "query.jpg"), options=FRESH)
