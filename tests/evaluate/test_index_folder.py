"""A saved index encodes a content once, follows the pictures, and is whole after any interruption."""

import hashlib
import sqlite3
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from declip_cli.errors import EvaluateError
from declip_cli.evaluate import index_database, index_folder
from declip_cli.evaluate.features import ImageFeatures
from declip_cli.evaluate.index_folder import IndexFolder, is_index_folder
from declip_cli.evaluate.listed import ListedPicture

DIM = 8


def vector_of(content: bytes):
    seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "little")
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Encoder:
    """Stands for a model: a random direction per content; contents that begin with `bad` cannot be read."""

    def __init__(self):
        self.seen = []

    def __call__(self, inputs: Sequence) -> ImageFeatures:
        contents = [load() for _, load in inputs]
        self.seen += contents
        kept = [number for number, content in enumerate(contents) if not content.startswith(b"bad")]
        if not kept:
            raise EvaluateError("none can be read", remedy="")
        rows = torch.from_numpy(np.stack([vector_of(contents[number]) for number in kept]))
        return ImageFeatures(features=rows, kept=kept)


def listed(contents: dict[str, bytes | None], *, stamps: str = "1", captions: dict[str, str] | None = None):
    def reader(path, content):
        def read():
            if content is None:
                raise FileNotFoundError(path)
            return content

        return read

    return [
        ListedPicture(path, reader(path, content), f"{stamps}:{content!r}", (captions or {}).get(path, ""))
        for path, content in contents.items()
    ]


def open_index(folder, fingerprint="model A"):
    return IndexFolder(folder, fingerprint=fingerprint, model_name=fingerprint)


def many(count: int, start: int = 0) -> dict[str, bytes]:
    return {f"{number:04}.jpg": b"content %d" % number for number in range(start, start + count)}


def found_paths(index, content: bytes, k: int = 3):
    return [match.path for match in index.search(vector_of(content), k)]


def test_each_picture_is_found_by_its_own_vector_after_reopening(tmp_path):
    with open_index(tmp_path / "index") as index:
        index.update(listed(many(30)), Encoder())
        index.rebuild("")
    assert is_index_folder(tmp_path / "index")
    with open_index(tmp_path / "index") as index:
        assert len(index) == 30
        best = index.search(vector_of(b"content 7"), 2)
        assert best[0].path == "0007.jpg"
        assert best[0].score == pytest.approx(1.0, abs=1e-6)
        assert best[1].score < 0.99


def test_only_what_is_new_or_changed_is_encoded(tmp_path):
    encoder = Encoder()
    contents: dict[str, bytes | None] = dict(many(10))
    with open_index(tmp_path) as index:
        first = index.update(listed(contents), encoder)
        encoder.seen.clear()
        del contents["0000.jpg"]
        contents |= {"0001.jpg": b"other", "new.jpg": b"new", "copy.jpg": b"content 5"}
        changes = index.update(listed(contents), encoder)
        assert index.update(listed(contents), encoder).to_json() == dict.fromkeys(changes.to_json(), 0)
        index.rebuild("")
        assert first.num_added == first.num_encoded == 10
        assert encoder.seen == [b"other", b"new"]
        assert (changes.num_added, changes.num_changed, changes.num_removed, changes.num_encoded) == (2, 1, 1, 2)
        assert len(index) == 11
        assert found_paths(index, b"content 5", 2) == ["0005.jpg", "copy.jpg"]
        assert "0000.jpg" not in found_paths(index, b"content 0", 20)
        assert found_paths(index, b"other")[0] == "0001.jpg"


def test_touched_files_are_read_but_not_encoded_again(tmp_path):
    encoder = Encoder()
    with open_index(tmp_path) as index:
        index.update(listed(many(5)), encoder)
        encoder.seen.clear()
        changes = index.update(listed(many(5), stamps="2"), encoder)
    assert (changes.num_changed, changes.num_encoded, encoder.seen) == (5, 0, [])


def test_unreadable_pictures_are_counted_and_not_tried_again(tmp_path):
    encoder = Encoder()
    contents = many(3) | {"bad.jpg": b"bad", "gone.jpg": None}
    with open_index(tmp_path) as index:
        index.update(listed(contents), encoder)
        encoder.seen.clear()
        index.update(listed(contents), encoder)
        assert encoder.seen == []
        skipped = index.skipped()
        assert len(index) == 3
    assert skipped["missing file"] == {"count": 1, "first": "gone.jpg"}
    assert sum(int(entry["count"]) for entry in skipped.values()) == 2


def test_block_of_nothing_but_unreadable_pictures_is_no_error(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(3)), Encoder())
        index.update(listed(many(3) | {"bad.jpg": b"bad", "worse.jpg": b"bad too"}), Encoder())
        assert len(index) == 3


def test_index_without_a_picture_cannot_be_searched(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed({"bad.jpg": b"bad"}), Encoder())
        with pytest.raises(EvaluateError, match="holds no picture"):
            index.rebuild("")


def test_captions_follow_the_list(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(3), captions={"0001.jpg": "old"}), Encoder())
        index.update(listed(many(3), captions={"0001.jpg": "new"}), Encoder())
        assert index.search(vector_of(b"content 1"), 1)[0].caption == "new"


def test_interruption_loses_at_most_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(index_folder, "_BLOCK", 4)
    encoder, calls = Encoder(), []

    def interrupted(inputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encoder(inputs)

    with pytest.raises(KeyboardInterrupt), open_index(tmp_path) as index:
        index.update(listed(many(20)), interrupted)
    encoder.seen.clear()
    with open_index(tmp_path) as index:
        index.update(listed(many(20)), encoder)
        index.rebuild("")
        assert len(encoder.seen) == 12
        assert [found_paths(index, content)[0] for content in many(20).values()] == list(many(20))


def test_rows_of_a_broken_off_write_are_overwritten(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(5)), Encoder())
        (vectors,) = tmp_path.glob("vectors-*.f32")
        with vectors.open("ab") as file:
            file.write(b"half a row")
        index.update(listed(many(9)), Encoder())
        assert vectors.stat().st_size == 9 * DIM * 4
        assert found_paths(index, b"content 8")[0] == "0008.jpg"


@pytest.mark.parametrize("spec", ["HNSW8", "IVF4,Flat"])
def test_faiss_index_is_kept_and_grows(tmp_path, spec):
    with open_index(tmp_path) as index:
        index.update(listed(many(200)), Encoder())
        index.rebuild(spec)
    before = next(tmp_path.glob("index-*.faiss"))
    with open_index(tmp_path) as index:
        assert index.spec == spec
        index.rebuild("")
        assert next(tmp_path.glob("index-*.faiss")) == before
        index.update(listed(many(230)), Encoder())
        index.rebuild("")
        assert index.spec == spec
        assert found_paths(index, b"content 219")[0] == "0219.jpg"
        assert len(list(tmp_path.glob("index-*.faiss"))) == 1
        index.rebuild("Flat")
        assert not list(tmp_path.glob("index-*.faiss"))


def test_trained_index_is_trained_again_when_it_has_doubled(tmp_path, monkeypatch):
    built = []
    build = index_folder.ApproximateIndex.build
    monkeypatch.setattr(
        index_folder.ApproximateIndex, "build", lambda spec, rows: built.append(len(rows)) or build(spec, rows)
    )
    with open_index(tmp_path) as index:
        for count in (100, 150, 201):
            index.update(listed(many(count)), Encoder())
            index.rebuild("IVF2,Flat")
    assert built == [100, 201]


@pytest.mark.parametrize("spec", ["Flat", "HNSW8"])
def test_many_removed_pictures_are_dropped_from_the_files(tmp_path, spec):
    with open_index(tmp_path) as index:
        index.update(listed(many(100)), Encoder())
        index.rebuild(spec)
        index.update(listed(many(70, start=30)), Encoder())
        index.rebuild("")
        (vectors,) = tmp_path.glob("vectors-*.f32")
        assert vectors.stat().st_size == 70 * DIM * 4
        assert all(found_paths(index, content)[0] == path for path, content in many(70, start=30).items())
        assert index.update(listed(many(100)), Encoder()).num_encoded == 30
        index.rebuild("")
        assert found_paths(index, b"content 3")[0] == "0003.jpg"


def test_few_removed_pictures_are_only_left_out(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(50)), Encoder())
        index.update(listed(many(49, start=1)), Encoder())
        index.rebuild("HNSW8")
        assert len(index) == 49
        assert "0000.jpg" not in found_paths(index, b"content 0", 49)
        encoder = Encoder()
        index.update(listed(many(50)), encoder)
        assert encoder.seen == []


def test_index_of_another_model_is_refused(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(2)), Encoder())
    with pytest.raises(EvaluateError, match="was made with the model model A, not model B") as caught:
        open_index(tmp_path, "model B")
    assert "--index-dir" in caught.value.remedy


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluateError, match="cannot open the index"):
        open_index(tmp_path / "file" / "index")


def test_lost_vectors_are_told(tmp_path):
    with open_index(tmp_path) as index:
        index.update(listed(many(3)), Encoder())
        next(tmp_path.glob("vectors-*.f32")).write_bytes(b"")
        with pytest.raises(EvaluateError, match="is damaged"):
            index.search(vector_of(b"x"), 1)


def test_two_writers_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(index_database, "_WAIT_S", 0.05)
    with open_index(tmp_path) as index:
        index.update(listed(many(2)), Encoder())
        other = sqlite3.connect(tmp_path / "pictures.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(EvaluateError, match="being written by another declip"):
            index.update(listed(many(4)), Encoder())
        other.execute("ROLLBACK")
        other.close()
        index.update(listed(many(4)), Encoder())
        assert len(index) == 4
