"""Every source of a search lists its pictures once, in a fixed order."""

import io
import json
import tarfile

import pytest

from declip_cli.data.picture_lists import list_pictures
from declip_cli.errors import EvaluateError


@pytest.fixture
def photos(tmp_path, make_picture):
    folder = tmp_path / "photos"
    for number, name in enumerate(("b.jpg", "a.PNG", "sub/c.webp", ".hidden.jpg", "notes.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_picture(number))
    return folder


def names_of(found):
    return [picture.path.rpartition("/")[2] for picture in found.pictures]


def test_folder_is_read_with_its_subfolders(photos):
    found = list_pictures(str(photos))
    assert names_of(found) == ["a.PNG", "b.jpg", "c.webp"]
    assert all(picture.read() and picture.stamp for picture in found.pictures)


def test_stamp_changes_with_the_file(photos, make_picture):
    before = list_pictures(str(photos)).pictures[1].stamp
    (photos / "b.jpg").write_bytes(make_picture(9, width=50))
    assert list_pictures(str(photos)).pictures[1].stamp != before


def test_captions_come_along(photos):
    (photos / "captions.jsonl").write_text(json.dumps({"file": "sub/c.webp", "captions": ["first", "second"]}))
    assert [picture.caption for picture in list_pictures(str(photos)).pictures] == ["", "", "first"]


def test_lines_from_stdin_are_taken_once_and_missing_ones_counted(photos):
    lines = [f"{photos}/b.jpg\n", f"{photos}/gone.jpg\n", "\n", f"{photos}/b.jpg\n", f"{photos}/sub\n"]
    found = list_pictures("-", lines=lines)
    assert names_of(found) == ["b.jpg"]
    assert found.skipped == {"missing file": (1, f"{photos}/gone.jpg"), "folder": (1, f"{photos}/sub")}


def test_single_picture_is_a_collection_too(photos):
    assert names_of(list_pictures(str(photos / "b.jpg"))) == ["b.jpg"]


def test_shards_give_keys_and_captions(tmp_path, make_picture):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in ("x", "y"):
            for name, data in ((f"{key}.jpg", make_picture(1)), (f"{key}.txt", key.encode() * 3)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = list_pictures(str(tmp_path))
    assert [(picture.path, picture.caption) for picture in found.pictures] == [("x", "xxx"), ("y", "yyy")]
    assert found.pictures[1].read() == make_picture(1)


def test_demo_lists_the_test_vendor_with_captions():
    found = list_pictures("demo")
    assert len(found.pictures) == 1217
    assert found.pictures[0].caption


@pytest.mark.parametrize(("source", "told"), [("nowhere", "no folder named 'nowhere'"), ("-", "on stdin")])
def test_nothing_there_is_an_error(source, told):
    with pytest.raises(EvaluateError, match=told):
        list_pictures(source)


def test_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(EvaluateError, match="no pictures found in"):
        list_pictures(str(tmp_path))


def test_list_without_a_single_picture_names_the_first_line():
    with pytest.raises(EvaluateError, match="none of the 1 paths on stdin is a picture .*nope.jpg, missing file"):
        list_pictures("-", lines=["nope.jpg\n"])
