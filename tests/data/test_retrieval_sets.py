"""Retrieval sets are read from the layouts in which they are distributed."""

import json

import pytest

from declip_cli.data.retrieval_sets import KNOWN_RETRIEVAL, has_shards, locate_known, open_retrieval
from declip_cli.errors import DataError, EvaluateError


def write_pictures(folder, names, make_picture):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(make_picture(number))


def karpathy(names, *, num_captions=5, split="test", filepath=""):
    rows = []
    for name in names:
        row = {"filename": name, "split": split}
        row["sentences"] = [{"raw": f"{name} words {number}"} for number in range(num_captions)]
        rows.append(row | ({"filepath": filepath} if filepath else {}))
    return rows


def check(found, names, *, num_captions=5):
    assert [key.rpartition("/")[2] for key, _ in found.pictures] == names
    assert len(found.texts) == num_captions * len(names)
    assert list(found.owners) == [number for number in range(len(names)) for _ in range(num_captions)]
    assert all(read() for _, read in found.pictures)
    assert found.texts[num_captions].startswith(f"{names[1]} words 0")


def test_karpathys_file_gives_its_test_split(tmp_path, make_picture):
    root = tmp_path / "flickr30k"
    write_pictures(root / "flickr30k-images", ["1.jpg", "2.jpg"], make_picture)
    rows = karpathy(["0.jpg"], split="train") + karpathy(["1.jpg", "2.jpg"])
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    found = open_retrieval("flickr30k", data_root=tmp_path)
    check(found, ["1.jpg", "2.jpg"])
    assert found.fold_size == 0


def test_coco_has_five_captions_a_picture_and_folds(tmp_path, make_picture):
    root = tmp_path / "coco"
    write_pictures(root / "val2014", ["a.jpg", "b.jpg"], make_picture)
    rows = karpathy(["a.jpg", "b.jpg"], num_captions=7, filepath="val2014")
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    found = open_retrieval("coco", data_root=tmp_path)
    check(found, ["a.jpg", "b.jpg"])
    assert found.fold_size == 1000


def test_clip_benchmarks_coco_file(tmp_path, make_picture):
    write_pictures(tmp_path / "val2014", ["a.jpg", "b.jpg"], make_picture)
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": picture, "caption": f"{name} words {number}"}
            for number in range(6)
            for picture, name in ((9, "b.jpg"), (7, "a.jpg"))
        ],
    }
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(content))
    check(open_retrieval("coco", data_root=tmp_path), ["a.jpg", "b.jpg"])


def test_clip_benchmarks_flickr_file_with_commas_in_captions(tmp_path, make_picture):
    root = tmp_path / "flickr8k"
    write_pictures(root / "Images", ["1.jpg", "2.jpg"], make_picture)
    lines = [f"{name},{name} words {number}, and more" for name in ("1.jpg", "2.jpg") for number in range(5)]
    (root / "flickr8k_test_karpathy.txt").write_text("\n".join(["image,caption", *lines]))
    found = open_retrieval("flickr8k", data_root=tmp_path)
    check(found, ["1.jpg", "2.jpg"])
    assert found.texts[0] == "1.jpg words 0, and more"


def test_flickr8k_as_its_authors_gave_it(tmp_path, make_picture):
    root = tmp_path / "flickr8k"
    write_pictures(root / "Flicker8k_Dataset", ["1.jpg", "2.jpg"], make_picture)
    (root / "Flickr_8k.testImages.txt").write_text("1.jpg\n2.jpg\n")
    names = ("0.jpg", "1.jpg", "2.jpg")
    lines = [f"{name}#{number}\t{name} words {number}" for name in names for number in range(5)]
    (root / "Flickr8k.token.txt").write_text("\n".join(lines))
    check(open_retrieval("flickr8k", data_root=tmp_path), ["1.jpg", "2.jpg"])


@pytest.mark.parametrize("name", KNOWN_RETRIEVAL)
def test_what_is_not_there_is_told_with_what_to_put_where(tmp_path, name):
    known = KNOWN_RETRIEVAL[name]
    assert locate_known(known, tmp_path) is None
    with pytest.raises(EvaluateError, match=f"{name} is not there") as caught:
        open_retrieval(name, data_root=tmp_path)
    assert known.files[0] in caught.value.remedy
    assert str(tmp_path / name) in caught.value.remedy


def test_folder_with_captions_counts_what_is_no_pair(tmp_path, make_picture):
    write_pictures(tmp_path / "sub", ["a.jpg", "b.jpg", "c.jpg"], make_picture)
    lines = [
        {"file": "sub/a.jpg", "caption": "one"},
        {"file": "sub/b.jpg", "captions": ["two", " three "]},
        {"file": "sub/c.jpg", "caption": "  "},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\nnot json\n"
    (tmp_path / "captions.jsonl").write_text(text)
    found = open_retrieval(str(tmp_path))
    assert found.texts == ["one", "two", "three"]
    assert found.owners == [0, 1, 1]
    assert found.skipped == {"empty caption": (1, "sub/c.jpg"), "damaged line": (1, "captions.jsonl:4")}


def test_folder_with_text_files_beside_the_pictures(tmp_path, make_picture):
    write_pictures(tmp_path, ["a.jpg", "b.jpg"], make_picture)
    (tmp_path / "a.txt").write_text("a bus")
    found = open_retrieval(str(tmp_path))
    assert found.texts == ["a bus"]
    assert found.skipped == {"missing caption": (1, "b.jpg")}
    assert found.pictures[0][1]() == make_picture(0)


def test_folder_without_captions_says_how_to_search_it(tmp_path, make_picture):
    write_pictures(tmp_path, ["a.jpg"], make_picture)
    with pytest.raises(EvaluateError, match=r"no picture with a caption .*missing caption: 1") as caught:
        open_retrieval(str(tmp_path))
    assert "--query" in caught.value.remedy


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(EvaluateError, match="no data set or folder named 'flikr'") as caught:
        open_retrieval("flikr")
    assert "flickr30k" in caught.value.remedy


def test_broken_karpathy_file_is_an_error(tmp_path):
    (tmp_path / "dataset_coco.json").write_text("[]")
    with pytest.raises(DataError, match="dataset_coco.json"):
        open_retrieval("coco", data_root=tmp_path)


def test_shards_are_told_from_folders_of_pictures(tmp_path):
    assert not has_shards(str(tmp_path))
    (tmp_path / "00000.tar").write_bytes(b"")
    assert has_shards(str(tmp_path))
