"""The store reads and encodes only what is new, survives interruptions and damage, and takes several processes."""

import dataclasses
import os
import shutil
import sqlite3
import threading

import numpy as np
import pytest
import torch

from declip_cli.data.dataset import UNREAD
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate import nearest, vectors
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import embedder, image_features, update_store
from declip_cli.evaluate.search import Query
from declip_cli.evaluate.search import search as search_images
from declip_cli.evaluate.vectors import DATABASE, VectorStore, is_store
from tests.data_sets import MemoryDataset

OPTIONS = FeatureOptions(precision="fp32", batch_size=4, threads=2)


class Collection(MemoryDataset):
    """Images by key with stamps, which counts what is read."""

    def __init__(self, contents, *, stamp="1", captions=()):
        super().__init__(list(contents.values()), keys=list(contents), captions=captions)
        self.num_read, self._stamp = 0, stamp

    def read(self, number):
        self.num_read += 1
        return super().read(number)

    def stamp(self, number):
        content = self.images[number]
        return f"{self._stamp}:{hash(content) if isinstance(content, bytes) else id(content)}"


@pytest.fixture
def many(make_image):
    def make(count, start=0):
        return {f"{number:03}.jpg": make_image(number) for number in range(start, start + count)}

    return make


@pytest.fixture
def open_store(tmp_path, tiny_model):
    return lambda: VectorStore(tmp_path / "index", model="a", model_name="model a")


@pytest.fixture
def stored(open_store):
    """Return the vectors of the store as they are now."""

    def read():
        with open_store() as store:
            return np.array(store.vectors())

    return read


@pytest.fixture
def update(open_store, tiny_model):
    """Bring the store up to date; return what was located, and how many images were encoded."""
    whole = embedder(tiny_model)

    def work(dataset, encode=whole):
        counts = []
        with open_store() as store:
            found = update_store(store, tiny_model, dataset, lambda x: counts.append(len(x)) or encode(x), OPTIONS)
        return found, sum(counts)

    return work


def test_a_second_look_reads_nothing(update, stored, many, tiny_model):
    first, num_encoded = update(Collection(many(9)))
    vectors = stored()[first.rows]
    again = Collection(many(9))
    second, num_again = update(again)
    assert (num_encoded, num_again, again.num_read) == (9, 0, 0)
    assert np.array_equal(stored()[second.rows], vectors)
    exact = image_features(tiny_model, again, options=dataclasses.replace(OPTIONS, use_cache=False)).features
    np.testing.assert_allclose(vectors, exact, atol=1e-6)


def test_touched_and_renamed_images_are_read_but_not_encoded(update, many):
    contents = many(5)
    update(Collection(contents))
    touched = Collection(contents, stamp="2")
    assert (update(touched)[1], touched.num_read) == (0, 5)
    renamed = Collection({f"new {key}": content for key, content in contents.items()})
    found, num_encoded = update(renamed)
    assert (num_encoded, renamed.num_read) == (0, 5)
    assert found.rows.tolist() == [0, 1, 2, 3, 4]


def test_only_new_contents_are_encoded(update, many, make_image):
    contents = many(5)
    update(Collection(contents))
    changed = Collection(contents | {"001.jpg": make_image(70), "new.jpg": make_image(71), "copy.jpg": make_image(3)})
    found, num_encoded = update(changed)
    assert (num_encoded, changed.num_read, found.num_changed) == (2, 3, 1)
    assert found.rows.tolist() == [0, 5, 2, 3, 4, 6, 3]


def test_contents_that_are_no_images_are_not_read_again_but_failed_reads_are(update, many):
    def fail():
        raise DataError("no answer", remedy="none", cause=UNREAD)

    contents = many(3) | {"bad.jpg": b"junk", "far.jpg": fail}
    found, _ = update(Collection(contents))
    again = Collection(contents)
    second, _ = update(again)
    assert found.rows.tolist() == second.rows.tolist() == [0, 1, 2, -1, -1]
    assert found.skipped == second.skipped == {"not an image": (1, "bad.jpg"), UNREAD: (1, "far.jpg")}
    assert again.num_read == 1


def test_an_interruption_loses_at_most_a_batch(update, many, tiny_model):
    calls = []

    def interrupted(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embedder(tiny_model)(images)

    with pytest.raises(KeyboardInterrupt):
        update(Collection(many(20)), interrupted)
    assert update(Collection(many(20)))[1] == 12


def test_rows_of_a_broken_off_write_are_overwritten(update, stored, many, tmp_path):
    found, _ = update(Collection(many(5)))
    expected = stored()[found.rows]
    (path,) = tmp_path.rglob("*.f32")
    with path.open("ab") as file:
        file.write(b"half a row")
    again, _ = update(Collection(many(9)))
    assert path.stat().st_size == 9 * 10 * 4
    assert np.array_equal(stored()[again.rows[:5]], expected)


def damage_database(folder):
    (folder / DATABASE).write_bytes(b"junk" * 1000)


def damage_pages(folder):
    data = bytearray((folder / DATABASE).read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    (folder / DATABASE).write_bytes(data)


def damage_vectors(folder):
    os.truncate(next(folder.glob("*.f32")), 50)


def change_a_bit(folder):
    path = next(folder.glob("*.f32"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def lose_vectors(folder):
    next(folder.glob("*.f32")).unlink()


def change_facts(folder):
    database = sqlite3.connect(folder / DATABASE)
    database.execute("UPDATE facts SET value = 'x' WHERE name = 'dim'")
    database.commit()


@pytest.mark.parametrize(
    "damage", [damage_database, damage_pages, damage_vectors, change_a_bit, lose_vectors, change_facts]
)
def test_a_damaged_store_is_made_anew_with_a_note(damage, many, tiny_model, tmp_path):
    given = []
    options = dataclasses.replace(OPTIONS, log=given.append)
    dataset = Collection(many(6))
    first = image_features(tiny_model, dataset, options=options).features
    (database,) = tmp_path.rglob(DATABASE)
    damage(database.parent)
    assert torch.allclose(image_features(tiny_model, dataset, options=options).features, first, atol=1e-6)
    assert len(given) == 1
    assert "is damaged" in given[0]
    dataset.num_read = 0
    image_features(tiny_model, dataset, options=options)
    assert dataset.num_read == 0


def test_a_store_that_cannot_be_used_is_done_without(many, tiny_model, tmp_path, monkeypatch):
    given = []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "file"))
    options = dataclasses.replace(OPTIONS, log=given.append)
    assert len(image_features(tiny_model, Collection(many(3)), options=options).kept) == 3
    assert "features are computed and not kept" in given[0]


def test_writers_wait_for_each_other_but_not_for_ever(open_store, many, monkeypatch, update):
    monkeypatch.setattr(vectors, "_WAIT_S", 0.05)
    update(Collection(many(2)))
    with open_store() as one:
        other = sqlite3.connect(one.folder / DATABASE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(EvaluateError, match="cannot use the index"):
            update(Collection(many(4)))
        other.execute("ROLLBACK")
        other.close()
    assert update(Collection(many(4)))[1] == 2


def test_writers_at_the_same_time_end_with_the_same_rows(update, many):
    found = {}

    def work(name, dataset):
        found[name] = update(dataset)[0]

    parts = {"a": Collection(many(16)), "b": Collection(many(16, start=8))}
    workers = [threading.Thread(target=work, args=part) for part in parts.items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    whole = update(Collection(many(24)))
    assert whole[1] == 0
    for name, rows in (("a", whole[0].rows[:16]), ("b", whole[0].rows[8:])):
        assert found[name].rows.tolist() == rows.tolist()
    assert len(set(whole[0].rows.tolist())) == 24


def test_names_that_were_listed_before_another_writes_still_fit_the_vectors(open_store, many, update):
    update(Collection(many(8)))
    with open_store() as reader, open_store() as writer:
        listed, before = reader.listed(), np.array(reader.vectors())
        assert writer.keep_asked() == 8
        update(Collection(many(3, start=20)))
        rows = [row for _, _, row in listed]
        assert np.array_equal(reader.vectors()[rows], before[rows])


def test_paths_of_other_folders_are_told_apart(many, tiny_model, tmp_path, monkeypatch):
    one, other = (Collection({"1.jpg": many(2)[f"00{n}.jpg"]}) for n in (0, 1))
    other.stamp = one.stamp  # as of files of one size that were unpacked in the same second
    found = []
    for name, dataset in (("a", one), ("b", other)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.append(image_features(tiny_model, dataset, options=OPTIONS).features)
    assert not torch.allclose(*found)


@pytest.fixture
def search(tiny_model, tmp_path):
    def work(dataset, *, index="", k=3, text="x", model=tiny_model):
        return search_images(
            model, dataset, Query(texts=(text,)), folder=tmp_path / "index", k=k, index=index, options=OPTIONS
        )

    return work


def paths_of(report):
    return sorted(hit.path for hit in report.hits)


def test_a_saved_index_follows_the_images_and_says_what_changed(search, many, make_image, tmp_path):
    assert search(Collection(many(10))).changes == {
        "num_added": 10, "num_changed": 0, "num_removed": 0, "num_encoded": 10
    }  # fmt: skip
    assert is_store(tmp_path / "index")
    contents = many(10)
    del contents["000.jpg"]
    contents |= {"001.jpg": make_image(50), "new.jpg": make_image(51), "copy.jpg": make_image(5)}
    report = search(Collection(contents), k=20)
    assert report.changes == {"num_added": 2, "num_changed": 1, "num_removed": 1, "num_encoded": 2}
    assert paths_of(report) == sorted(contents)
    scores = {hit.path: hit.score for hit in report.hits}
    assert scores["copy.jpg"] == scores["005.jpg"]
    assert set(search(Collection(contents)).changes.values()) == {0}


def test_captions_and_odd_names_are_kept_for_a_search_without_the_images(search, many):
    contents = dict(zip(["\udcff.jpg", "b\n.jpg"], many(2).values(), strict=True))
    search(Collection(contents, captions=[("old",), ("two",)]))
    search(Collection(contents, captions=[("one\ud800",), ("two",)]))
    alone = search(None)
    assert {hit.path: hit.caption for hit in alone.hits} == {"\udcff.jpg": "one\ud800", "b\n.jpg": "two"}
    assert (alone.changes, alone.num_indexed) == ({}, 2)


def test_removed_images_are_not_found_and_not_encoded_again_when_they_come_back(search, many):
    search(Collection(many(30)))
    report = search(Collection(many(20, start=10)), k=30)
    assert paths_of(report) == sorted(many(20, start=10))
    assert [hit.path for hit in search(None, k=30).hits] == [hit.path for hit in report.hits]
    assert search(Collection(many(30))).changes["num_encoded"] == 0


@pytest.mark.parametrize("spec", ["HNSW8", "IVF2,Flat"])
def test_an_index_of_faiss_is_kept_grows_and_is_made_anew_when_damaged(search, many, tmp_path, spec, monkeypatch):
    built = []
    build = nearest.ApproximateIndex.build
    monkeypatch.setattr(
        nearest.ApproximateIndex, "build", staticmethod(lambda *a: built.append(len(a[2])) or build(*a))
    )
    for count, num_built in ((20, 1), (20, 1), (30, 1), (41, 2)):
        report = search(Collection(many(count)), index=spec if count == 20 else "", k=count)
        assert (report.index, len(built), len(report.hits)) == (spec, num_built, count)
        assert len(list(tmp_path.rglob("*.faiss"))) == 1
    next(tmp_path.rglob("*.faiss")).write_bytes(b"junk")
    assert len(search(None, k=41).hits) == 41
    assert built[2:] == [41]
    assert paths_of(search(Collection(many(30)), k=41)) == sorted(many(30))
    assert search(Collection(many(30)), index="Flat").index == "Flat"
    assert not list(tmp_path.rglob("*.faiss"))


def test_vectors_of_a_database_that_is_gone_are_deleted(search, many, tmp_path):
    search(Collection(many(3)))
    (tmp_path / "index" / DATABASE).unlink()
    search(Collection(many(3)))
    assert len(list(tmp_path.rglob("*.f32"))) == 1


def test_a_copied_index_is_used_as_it_is(search, many, tmp_path):
    search(Collection(many(4)))
    shutil.copytree(tmp_path / "index", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "copy").rename(tmp_path / "index")
    again = Collection(many(4))
    search(again)
    assert again.num_read == 0


def test_an_index_of_another_model_is_refused(search, many, tiny_model):
    search(Collection(many(2)))
    other = dataclasses.replace(tiny_model, fingerprint="other", name="model b")
    with pytest.raises(EvaluateError, match="was made with the model random-0, not model b") as caught:
        search(Collection(many(2)), model=other)
    assert "--index-dir" in caught.value.remedy


def test_a_damaged_index_without_its_images_is_an_error_with_the_remedy(search, many, tmp_path):
    search(Collection(many(2)))
    damage_vectors(tmp_path / "index")
    with pytest.raises(EvaluateError, match="is damaged") as caught:
        search(None)
    assert "--index-dir" in caught.value.remedy
    assert len(search(Collection(many(2))).hits) == 2


def test_an_index_without_an_image_cannot_be_searched(search):
    with pytest.raises(EvaluateError, match="holds no image"):
        search(Collection({"bad.jpg": b"junk"}))


def test_an_index_folder_that_cannot_be_made_is_an_error(search, many, tmp_path):
    (tmp_path / "index").write_text("")
    with pytest.raises(EvaluateError, match="cannot use the index"):
        search(Collection(many(2)))
