"""Exact search equals a full sort; approximate indexes find nearly all and score exactly."""

import sys

import numpy as np
import pytest

from declip_cli.errors import EvaluateError
from declip_cli.evaluate import nearest
from declip_cli.evaluate.nearest import ApproximateIndex, quick_spec, search_exact


def make_vectors(num: int, dim: int, seed: int = 0):
    random = np.random.default_rng(seed)
    centers = random.standard_normal((12, dim))
    vectors = centers[random.integers(0, 12, num)] + 0.5 * random.standard_normal((num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_exact_search_is_a_full_sort_for_each_query(monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK_ROWS", 64)
    vectors = make_vectors(150, 6)
    queries = vectors[[17, 3, 149]]
    found = search_exact(vectors, np.arange(150), queries, 9)
    assert len(found) == 3
    for query, (scores, rows) in zip(queries, found, strict=True):
        assert rows.tolist() == np.argsort(-(vectors @ query), kind="stable")[:9].tolist()
        assert scores == pytest.approx((vectors @ query)[rows], abs=1e-6)


def test_rows_that_do_not_count_are_never_found_and_never_cost_a_hit(monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK_ROWS", 64)
    vectors = make_vectors(150, 6)
    order = np.argsort(-(vectors @ vectors[0]), kind="stable")
    ((_, rows),) = search_exact(vectors, np.sort(order[20:]), vectors[:1], 10)
    assert rows.tolist() == order[20:30].tolist()


def test_more_hits_than_vectors_gives_all():
    vectors = make_vectors(5, 4)
    ((_, rows),) = search_exact(vectors, np.array([0, 1, 3, 4]), vectors[:1], 10)
    assert sorted(rows.tolist()) == [0, 1, 3, 4]


def test_of_equal_vectors_the_earlier_comes_first_in_and_across_blocks(monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK_ROWS", 4)
    vectors = np.repeat(np.eye(1, 4, dtype=np.float32), 12, axis=0)
    ((_, rows),) = search_exact(vectors, np.arange(12), vectors[:1], 3)
    assert rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("spec", ["HNSW16", "IVF8,Flat", "PCA12,IVF8,SQ8", "PQ8x4fs"])
def test_approximate_index_finds_nearly_all_and_scores_exactly(spec, tmp_path):
    vectors, rows = make_vectors(1200, 16), np.arange(1200)
    index = ApproximateIndex.build(spec, vectors, rows[:1000])
    index.add(vectors, rows[1000:])
    index.write(tmp_path / "index.faiss")
    again = ApproximateIndex.read(tmp_path / "index.faiss", spec)
    assert again is not None
    assert again.rows.tolist() == rows.tolist()
    num_right = 0
    queries = make_vectors(20, 16, seed=1)
    for query, (scores, found) in zip(queries, again.search(vectors, rows, queries, 10), strict=True):
        best = np.argsort(-(vectors @ query), kind="stable")[:10]
        assert scores == pytest.approx((vectors @ query)[found], abs=1e-6)
        assert (np.diff(scores) <= 0).all()
        num_right += len(set(found.tolist()) & set(best.tolist()))
    assert num_right >= 180


def test_approximate_index_looks_further_when_the_near_ones_do_not_count():
    vectors = make_vectors(1200, 16)
    index = ApproximateIndex.build("HNSW16", vectors, np.arange(1200))
    order = np.argsort(-(vectors @ vectors[0]), kind="stable")
    (_, others), (_, rows) = index.search(vectors, np.sort(order[300:]), vectors[[order[-1], 0]], 10)
    assert len(others) == len(rows) == 10
    assert len(set(rows.tolist()) & set(order[300:310].tolist())) >= 8


@pytest.mark.parametrize("is_clustered", [True, False])
def test_the_quick_index_of_a_large_collection_finds_what_comparing_all_finds(monkeypatch, is_clustered):
    monkeypatch.setattr(nearest, "_MIN_CODED_CANDIDATES", 400)
    random, dim = np.random.default_rng(3), 64
    vectors = make_vectors(6000, dim) if is_clustered else random.standard_normal((6000, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:40] + 0.1 * random.standard_normal((40, dim), dtype=np.float32)
    index = ApproximateIndex.build(quick_spec(nearest.QUICK_ROWS, dim), vectors, np.arange(6000))
    wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = [rows for _, rows in index.search(vectors, np.arange(6000), queries, 10)]
    assert np.mean([np.isin(*pair).mean() for pair in zip(wanted, found, strict=True)]) >= 0.99


def test_small_collections_and_odd_widths_are_compared_as_a_whole():
    assert quick_spec(nearest.QUICK_ROWS - 1, 512) == quick_spec(10**6, 511) == ""
    assert quick_spec(10**6, 512) == "PQ256x4fs"


def test_index_that_is_not_one_is_not_read(tmp_path):
    (tmp_path / "index.faiss").write_bytes(b"junk" * 20)
    assert ApproximateIndex.read(tmp_path / "index.faiss", "HNSW16") is None
    assert ApproximateIndex.read(tmp_path / "none.faiss", "HNSW16") is None


def test_unknown_description_is_refused():
    with pytest.raises(EvaluateError, match="cannot make an index 'TREE7' of 4 dimensions"):
        ApproximateIndex.build("TREE7", make_vectors(10, 4), np.arange(10))


def test_more_lists_than_vectors_are_refused_with_a_fitting_number():
    with pytest.raises(EvaluateError, match=r"IVF64,Flat needs at least 64 images .*found 50") as caught:
        ApproximateIndex.build("IVF64,Flat", make_vectors(50, 4), np.arange(50))
    assert "IVF1,Flat" in caught.value.remedy


def test_macos_gets_one_faiss_thread(monkeypatch):
    told = []
    monkeypatch.setattr(nearest.faiss, "omp_set_num_threads", told.append)
    monkeypatch.setattr(sys, "platform", "darwin")
    ApproximateIndex.build("HNSW16", make_vectors(10, 4), np.arange(10))
    assert told == [1]
