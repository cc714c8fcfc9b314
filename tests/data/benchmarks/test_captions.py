"""Retrieval sets are read from the layouts in which they are distributed."""

import json
from pathlib import Path

import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import Dataset
from declip_cli.errors import DataError


def write_images(folder, names, make_image):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(make_image(number))


def karpathy(names, *, num_captions=5, split="test", filepath=""):
    rows = []
    for name in names:
        row = {"filename": name, "split": split}
        row["sentences"] = [{"raw": f"{name} words {number}"} for number in range(num_captions)]
        rows.append(row | ({"filepath": filepath} if filepath else {}))
    return rows


def check(found: Dataset, names: list[str]) -> None:
    assert [Path(found.key(number)).name for number in range(len(found))] == names
    for number, name in enumerate(names):
        assert found.captions(number)[0].startswith(f"{name} words 0")
        assert len(found.captions(number)) == 5
        assert found.read(number).image
    assert found.classes is None


def test_karpathys_file_gives_its_test_split(tmp_path, make_image):
    root = tmp_path / "flickr30k"
    write_images(root / "flickr30k-images", ["1.jpg", "2.jpg"], make_image)
    rows = karpathy([f"gone{n}.jpg" for n in range(200)], split="train") + karpathy(["1.jpg", "2.jpg"])
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    found = open_dataset("flickr30k", data_root=tmp_path)
    check(found, ["1.jpg", "2.jpg"])
    assert found.fold_size == 0


def test_coco_has_five_captions_an_image_and_folds(tmp_path, make_image):
    root = tmp_path / "coco"
    write_images(root / "val2014", ["a.jpg", "b.jpg"], make_image)
    rows = karpathy(["a.jpg", "b.jpg"], num_captions=7, filepath="val2014")
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    found = open_dataset("coco", data_root=tmp_path)
    check(found, ["a.jpg", "b.jpg"])
    assert found.fold_size == 1000


def test_clip_benchmarks_coco_file(tmp_path, make_image):
    write_images(tmp_path / "val2014", ["a.jpg", "b.jpg"], make_image)
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": image, "caption": f"{name} words {number}"}
            for number in range(6)
            for image, name in ((9, "b.jpg"), (7, "a.jpg"))
        ],
    }
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(content))
    check(open_dataset("coco", data_root=tmp_path), ["a.jpg", "b.jpg"])


def test_cocos_own_validation_files_are_read_and_told_from_karpathys_split(tmp_path, make_image):
    root = tmp_path / "coco"
    write_images(root / "val2017", ["a.jpg", "b.jpg"], make_image)
    (root / "annotations").mkdir()
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": image, "caption": f"{name} words {number}"}
            for number in range(6)
            for image, name in ((9, "b.jpg"), (7, "a.jpg"))
        ],
    }
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    found = open_dataset("coco", data_root=tmp_path)
    check(found, ["a.jpg", "b.jpg"])
    assert "val2017, not Karpathy's test split" in found.note
    (root / "dataset_coco.json").write_text(json.dumps({"images": karpathy(["a.jpg"])}))
    again = open_dataset("coco", data_root=tmp_path)
    check(again, ["a.jpg"])
    assert again.note == ""


def test_clip_benchmarks_flickr_file_with_commas_in_captions(tmp_path, make_image):
    root = tmp_path / "flickr8k"
    write_images(root / "Images", ["1.jpg", "2.jpg"], make_image)
    lines = [f"{name},{name} words {number}, and more" for name in ("1.jpg", "2.jpg") for number in range(5)]
    (root / "flickr8k_test_karpathy.txt").write_text("\n".join(["image,caption", *lines]))
    found = open_dataset("flickr8k", data_root=tmp_path)
    check(found, ["1.jpg", "2.jpg"])
    assert found.captions(0)[0] == "1.jpg words 0, and more"


def test_flickr8k_as_its_authors_gave_it(tmp_path, make_image):
    root = tmp_path / "flickr8k"
    write_images(root / "Flicker8k_Dataset", ["1.jpg", "2.jpg"], make_image)
    (root / "Flickr_8k.testImages.txt").write_text("1.jpg\n2.jpg\n")
    names = ("0.jpg", "1.jpg", "2.jpg")
    lines = [f"{name}#{number}\t{name} words {number}" for name in names for number in range(5)]
    (root / "Flickr8k.token.txt").write_text("\n".join(lines))
    check(open_dataset("flickr8k", data_root=tmp_path), ["1.jpg", "2.jpg"])


def test_a_broken_karpathy_file_is_an_error(tmp_path):
    (tmp_path / "dataset_coco.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset_coco\.json"):
        open_dataset("coco", data_root=tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="names no test image|cannot find the images"):
        open_dataset("coco", data_root=tmp_path)
