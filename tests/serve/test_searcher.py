"""Requests become hits of the collection, and nothing else."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.evaluate import nearest
from declip_cli.evaluate.collection import Collection, open_collection
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.texts import text_features
from declip_cli.serve.searcher import Request, RequestError, Searcher

FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        place = folder / ("day" if number < 5 else "night")
        place.mkdir(exist_ok=True)
        (place / f"{number:02}.jpg").write_bytes(make_image(number))
    return folder


def make_searcher(model, photos):
    return Searcher(model, open_collection(model, open_dataset(str(photos)), options=FRESH), FRESH)


@pytest.fixture(scope="module")
def searcher(tiny_model, photos):
    return make_searcher(tiny_model, photos)


def ids(answer):
    return [hit["id"] for hit in answer["hits"]]


def test_parts_of_a_request_are_added_up_as_unit_vectors(searcher, tiny_model, photos):
    image = (photos / "day" / "02.jpg").read_bytes()
    request = Request(texts=("a bus",), minus=("rain",), like=7, image=image, k=12)
    images = image_features(tiny_model, open_dataset(str(photos)), options=FRESH).features.numpy()
    bus, rain = text_features(tiny_model, ["a bus", "rain"], options=FRESH).numpy()
    wanted = images[7] + images[2] + bus - rain
    scores = images @ (wanted / np.linalg.norm(wanted))
    answer = searcher.search(request)
    assert ids(answer) == np.argsort(-scores, kind="stable").tolist()
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert answer["query"] == f"images like {photos}/night/07.jpg + an image + a bus - rain"


def test_pages_of_hits_follow_each_other(searcher):
    whole = searcher.search(Request(texts=("x",), k=12))
    pages = [searcher.search(Request(texts=("x",), k=5, offset=offset)) for offset in (0, 5, 10, 15)]
    assert [hit for page in pages for hit in page["hits"]] == whole["hits"]
    assert [hit["rank"] for hit in whole["hits"]] == list(range(1, 13))


def test_hits_are_filtered_by_folder_and_score(searcher):
    answer = searcher.search(Request(texts=("x",), within="day", k=12))
    assert sorted(ids(answer)) == [0, 1, 2, 3, 4]
    assert (answer["num_within"], answer["num_indexed"]) == (5, 12)
    third = searcher.search(Request(texts=("x",), k=12))["hits"][2]["score"]
    assert len(searcher.search(Request(texts=("x",), k=12, min_score=third))["hits"]) == 3


def test_a_token_wise_model_finds_an_image_by_itself(tiny_token_model, photos):
    answer = make_searcher(tiny_token_model, photos).search(Request(like=3, k=1))
    assert ids(answer) == [3]
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "nothing to look for"),
        ({"text": [" "]}, "nothing to look for"),
        ({"minus": ["x"]}, "nothing to look for"),
        ({"path": ["/etc/passwd"]}, "unknown: path"),
        ({"text": ["x"], "k": ["2001"]}, "k is a whole number from 0 to 2000"),
        ({"text": ["x"], "k": ["٣"]}, "k is a whole number"),
        ({"text": ["x"], "offset": ["-1"]}, "offset is a whole number"),
        ({"text": ["x"], "min": ["nan"]}, "min is a score"),
        ({"like": ["../x"]}, "like is a whole number"),
        ({"text": ["x" * 2001]}, "at most 16 texts of 2000 characters"),
        ({"text": ["x"] * 17}, "at most 16 texts"),
    ],
)
def test_requests_that_mean_nothing_are_refused(words, told):
    with pytest.raises(RequestError, match=told):
        Request.parse(words)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request(like=12), "there is no image 12"),
        (Request(texts=("x",), within="elsewhere"), "has a path like 'elsewhere'"),
        (Request(texts=("x",), minus=("x",)), "are the same"),
        (Request(image=b"<svg onload=alert(1)>"), "not an image"),
    ],
)
def test_requests_that_find_nothing_say_why(searcher, request_, told):
    with pytest.raises(RequestError, match=told):
        searcher.search(request_)


def answers_at_once(searcher, requests):
    """Ask all while one search runs, so that they wait for it together."""
    with ThreadPoolExecutor(len(requests)) as pool, searcher._turn:
        futures = [pool.submit(searcher.search, request) for request in requests]
        while len(searcher._answer._waiting) < len(requests):
            time.sleep(0.001)
    return futures


def test_requests_that_wait_are_answered_together_as_each_alone_is(tiny_model, photos):
    searcher = make_searcher(tiny_model, photos)
    ways = itertools.product(range(5), (1, 3), ("", "day"))
    requests = [Request(like=number, k=k, within=within) for number, k, within in ways]
    requests.append(Request(like=1, minus=("x",), k=3))
    alone = [searcher.search(request)["hits"] for request in requests]
    compared = []
    answer = searcher._answer._work
    searcher._answer._work = lambda questions: compared.append(len(questions)) or answer(questions)
    together = [future.result()["hits"] for future in answers_at_once(searcher, requests)]
    assert compared == [len(requests)]
    assert [ids({"hits": hits}) for hits in together] == [ids({"hits": hits}) for hits in alone]
    scores = [[hit["score"] for hits in answers for hit in hits] for answers in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_texts_that_wait_are_encoded_together_as_each_alone_is(tiny_model, photos):
    requests = [Request(texts=(f"thing {number} {'x ' * number}",), k=12) for number in range(6)]
    alone = [make_searcher(tiny_model, photos).search(request)["hits"] for request in requests]
    searcher = make_searcher(tiny_model, photos)
    with ThreadPoolExecutor(6) as pool:
        together = [answer["hits"] for answer in pool.map(searcher.search, requests)]
    for one, other in zip(alone, together, strict=True):
        assert {hit["id"]: hit["score"] for hit in one} == pytest.approx({h["id"]: h["score"] for h in other}, abs=1e-6)


def test_a_large_collection_has_its_codes_compared_first(tiny_model, monkeypatch):
    monkeypatch.setattr(nearest, "QUICK_ROWS", 700)
    vectors = np.random.default_rng(0).standard_normal((700, 10), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    dataset, given = FilesDataset([f"{number}.jpg" for number in range(700)]), []
    collection = Collection(dataset, range(700), vectors, np.arange(700))
    searcher = Searcher(tiny_model, collection, replace(FRESH, log=given.append), quick=True)
    assert searcher.info()["index"] == "PQ5x4fs"
    assert given == ["making an index PQ5x4fs of 700 images, for speed; --index Flat compares all of them instead"]
    wanted = np.argsort(-(vectors @ vectors[4]), kind="stable")[:5].tolist()
    assert ids(searcher.search(Request(like=4, k=5))) == wanted


def test_an_image_that_is_gone_is_told_and_not_remembered(tiny_model, tmp_path, make_image):
    (tmp_path / "0.png").write_bytes(make_image(0, format="PNG"))
    searcher = make_searcher(tiny_model, tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "gone")
    with pytest.raises(RequestError, match="cannot be read"):
        searcher.thumbnail(0)
    (tmp_path / "gone").rename(tmp_path / "0.png")
    assert searcher.thumbnail(0).startswith(b"\xff\xd8")
    with pytest.raises(RequestError, match="there is no image 1"):
        searcher.view(1)


def test_the_collection_is_described(searcher, photos):
    info = searcher.info()
    assert info["folders"] == [f"{photos}/day", f"{photos}/night"]
    assert (info["num_indexed"], info["index"], info["model"]) == (12, "Flat", "random-0")
