import errno

import fsspec
import pytest

from declip_cli.data import storage
from declip_cli.errors import DataError


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
    else:
        yield "memory://test_storage"
        fsspec.filesystem("memory").rm("/test_storage", recursive=True)


def test_files_are_alike_on_disk_and_behind_urls(folder):
    storage.make_folder(storage.join(folder, "sub/deep"))
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub.txt", "sub/.hidden"):
        storage.write_whole(storage.join(folder, name), name.encode())
    assert list(storage.walk(folder)) == ["a.txt", "b.txt", "sub.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert storage.names_in(folder) == ["a.txt", "b.txt", "sub.txt"]
    assert storage.folders_in(folder) == ["sub"]
    assert storage.read_bytes(storage.join(folder, "sub/c.txt")) == b"sub/c.txt"
    assert storage.facts(storage.join(folder, "a.txt")).num_bytes == 5
    assert storage.is_folder(storage.join(folder, "sub"))
    assert not storage.is_file(storage.join(folder, "sub"))
    assert storage.parent(storage.join(folder, "a.txt")) == folder
    assert storage.expand(storage.join(folder, "*.txt")) == [
        storage.join(folder, name) for name in ("a.txt", "b.txt", "sub.txt")
    ]
    storage.remove_file(storage.join(folder, "a.txt"))
    storage.remove_file(storage.join(folder, "a.txt"))
    assert not storage.is_file(storage.join(folder, "a.txt"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "a.txt"))


def test_links_are_what_they_lead_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.tar").write_bytes(b"12345")
    folder = tmp_path / "links"
    folder.mkdir()
    for name, target in (("a.tar", "../real/a.tar"), ("sub", "../real"), ("broken", "nowhere"), ("loop", ".")):
        (folder / name).symlink_to(target)
    assert {name: facts.num_bytes for name, facts in storage.list_files(str(folder), (".tar", ".txt")).items()} == {
        "a.tar": 5
    }
    assert storage.folders_in(str(folder)) == ["loop", "sub"]
    assert list(storage.walk(str(folder))) == ["a.tar", "broken", "sub/a.tar"]


def test_a_file_appears_whole_or_not_at_all(tmp_path, folder):
    (tmp_path / "temporary").write_bytes(b"content")
    storage.move_into_place(str(tmp_path / "temporary"), storage.join(folder, "final"))
    assert storage.read_bytes(storage.join(folder, "final")) == b"content"
    assert not (tmp_path / "temporary").exists()


def test_braces_are_spelled_out_in_order():
    assert storage.expand("s3x/{08..11}-{a,b}.tar") == [
        f"s3x/{number}-{letter}.tar" for number in ("08", "09", "10", "11") for letter in "ab"
    ]
    assert storage.expand("plain.tar") == ["plain.tar"]


def test_an_unknown_kind_of_url_is_an_error():
    with pytest.raises(DataError, match="cannot open nosuch://bucket"):
        storage.open_binary("nosuch://bucket/file")


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full: cannot write out"), (errno.EACCES, "cannot write out: ")],
)
def test_failures_to_write_say_what_to_do(number, message):
    with pytest.raises(DataError, match=message), storage.disk_errors("out"):
        raise OSError(number, "reason")


def test_writing_where_that_is_not_possible_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        storage.make_folder(str(tmp_path / "file" / "below"))
