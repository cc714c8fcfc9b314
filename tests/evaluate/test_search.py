"""Search finds what the features say, by text and by image, with and without a saved index."""

from pathlib import Path

import numpy as np
import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.search import Query, search
from declip_cli.evaluate.texts import text_features

FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")


@pytest.fixture
def photos(tmp_path: Path, make_image) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.jpg").write_bytes(make_image(number))
    return folder


def test_hits_are_the_nearest_images_by_cosine(photos, tiny_model):
    listed = open_dataset(str(photos))
    report = search(tiny_model, listed, Query(texts=("a red bus",)), k=5, options=FRESH)
    images = image_features(tiny_model, listed, options=FRESH).features
    cosines = (images @ text_features(tiny_model, ["a red bus"], options=FRESH)[0]).numpy()
    order = np.argsort(-cosines, kind="stable")[:5]
    assert [hit.path for hit in report.hits] == [listed.key(number) for number in order]
    assert [hit.score for hit in report.hits] == pytest.approx(cosines[order], abs=1e-5)
    assert [hit.rank for hit in report.hits] == [1, 2, 3, 4, 5]
    assert report.num_indexed == 12


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_token_model"])
def test_image_finds_itself_first(photos, kind, request):
    model = request.getfixturevalue(kind)
    report = search(model, open_dataset(str(photos)), Query(image=photos / "07.jpg"), k=3, options=FRESH)
    assert report.hits[0].path.endswith("07.jpg")
    assert report.hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert report.query == str(photos / "07.jpg")


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_parts_of_a_query_are_added_up_as_unit_vectors_with_their_signs(photos, tiny_model):
    listed = open_dataset(str(photos))
    query = Query(texts=("a red bus", "rain"), image=photos / "03.jpg", minus=("night",))
    report = search(tiny_model, listed, query, k=12, options=FRESH)
    images = image_features(tiny_model, listed, options=FRESH).features.numpy()
    bus, rain, night = text_features(tiny_model, ["a red bus", "rain", "night"], options=FRESH).numpy()
    scores = images @ unit(images[3] + bus + rain - night)
    order = np.argsort(-scores, kind="stable")
    assert [hit.path for hit in report.hits] == [listed.key(number) for number in order]
    assert [hit.score for hit in report.hits] == pytest.approx(scores[order], abs=1e-5)


def test_what_is_not_wanted_lowers_the_score_of_a_token_wise_model(photos, tiny_token_model):
    def scores(**parts):
        found = search(tiny_token_model, open_dataset(str(photos)), Query(**parts), k=12, options=FRESH)
        return {hit.path: hit.score for hit in found.hits}

    bus, night, both = scores(texts=("a bus",)), scores(texts=("night",)), scores(texts=("a bus",), minus=("night",))
    assert both == pytest.approx({path: (bus[path] - night[path]) / 2 for path in bus}, abs=1e-6)


def test_parts_that_cancel_each_other_are_an_error(photos, tiny_model):
    query = Query(texts=("a bus",), minus=("a bus",))
    with pytest.raises(EvaluateError, match="are the same"):
        search(tiny_model, open_dataset(str(photos)), query, options=FRESH)


@pytest.mark.parametrize(
    ("within", "names"),
    [
        ("holiday", ["holiday/00.jpg", "holiday/sea/01.jpg"]),
        ("holiday/", ["holiday/00.jpg", "holiday/sea/01.jpg"]),
        ("holiday/*1.jpg", ["holiday/sea/01.jpg"]),
        ("sea", ["holiday/sea/01.jpg"]),
        ("*.png", ["day/02.png"]),
        ("day", ["day/02.png"]),
    ],
)
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_token_model"])
def test_a_search_is_confined_to_a_folder_or_a_pattern(tmp_path, kind, make_image, within, names, request):
    for number, name in enumerate(["holiday/00.jpg", "holiday/sea/01.jpg", "day/02.png", "03.jpg"]):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(make_image(number))
    model = request.getfixturevalue(kind)
    dataset = open_dataset(str(tmp_path / "all"))
    report = search(model, dataset, Query(texts=("x",)), within=within, options=FRESH)
    assert sorted(hit.path for hit in report.hits) == [str(tmp_path / "all" / name) for name in sorted(names)]
    assert (report.num_indexed, report.num_within) == (4, len(names))


def test_a_filter_on_an_approximate_index_scores_exactly(photos, tiny_model, tmp_path):
    listed, query = open_dataset(str(photos)), Query(texts=("a bus",))
    found = [search(tiny_model, listed, query, within="0[1-4].jpg", k=9, index=i, options=FRESH) for i in ("", "HNSW8")]
    assert [hit.path for hit in found[0].hits] == [hit.path for hit in found[1].hits]
    assert len(found[1].hits) == 4


def test_token_wise_model_scores_a_text_by_its_tokens_best_patches(photos, tiny_token_model):
    report = search(tiny_token_model, open_dataset(str(photos)), Query(texts=("a bus",)), k=12, options=FRESH)
    scores = [hit.score for hit in report.hits]
    assert len(scores) == 12
    assert scores == sorted(scores, reverse=True)


def test_token_wise_model_takes_no_index(photos, tiny_token_model, tmp_path):
    listed = open_dataset(str(photos))
    with pytest.raises(EvaluateError, match="--index HNSW8 needs one vector per image"):
        search(tiny_token_model, listed, Query(texts=("x",)), index="HNSW8", options=FRESH)
    with pytest.raises(EvaluateError, match="--index-dir needs one vector per image"):
        search(tiny_token_model, listed, Query(texts=("x",)), folder=tmp_path / "index", options=FRESH)


def test_saved_index_gives_the_same_hits_and_tells_what_changed(photos, tiny_model, tmp_path, make_image):
    listed = open_dataset(str(photos))
    plain = search(tiny_model, listed, Query(texts=("a red bus",)), k=4, options=FRESH)
    folder = tmp_path / "index"
    saved = search(tiny_model, listed, Query(texts=("a red bus",)), folder=folder, k=4, options=FRESH)
    assert [hit.path for hit in saved.hits] == [hit.path for hit in plain.hits]
    assert [hit.score for hit in saved.hits] == pytest.approx([hit.score for hit in plain.hits], abs=1e-5)
    assert saved.to_json()["num_added"] == 12
    (photos / "12.jpg").write_bytes(make_image(12))
    again = search(
        tiny_model, open_dataset(str(photos)), Query(image=photos / "12.jpg"), folder=folder, k=1, options=FRESH
    )
    assert again.hits[0].path.endswith("12.jpg")
    assert (again.changes["num_added"], again.changes["num_encoded"]) == (1, 1)


def test_saved_index_is_searched_without_its_images(photos, tiny_model, tmp_path):
    listed = open_dataset(str(photos))
    first = search(tiny_model, listed, Query(texts=("x",)), folder=tmp_path / "index", options=FRESH)
    alone = search(tiny_model, None, Query(texts=("x",)), folder=tmp_path / "index", options=FRESH)
    assert [hit.path for hit in alone.hits] == [hit.path for hit in first.hits]
    assert alone.changes == {}
    assert alone.hits[0].read() == Path(alone.hits[0].path).read_bytes()


def test_unreadable_images_are_counted(photos, tiny_model):
    (photos / "03.jpg").write_bytes(b"junk")
    report = search(tiny_model, open_dataset(str(photos)), Query(texts=("x",)), k=20, options=FRESH).to_json()
    assert len(report["hits"]) == report["num_indexed"] == 11
    assert report["num_skipped"] == 1


def test_unreadable_query_image_is_an_error(photos, tiny_model, tmp_path):
    (tmp_path / "query.jpg").write_bytes(b"junk")
    with pytest.raises(EvaluateError, match="query.jpg"):
        search(tiny_model, open_dataset(str(photos)), Query(image=tmp_path / "query.jpg"), options=FRESH)
