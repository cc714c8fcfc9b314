import errno
import io
import json
import os
import pickle
import tarfile
import threading

import pytest

from declip_cli.data import storage
from declip_cli.data.dataset import UNREAD
from declip_cli.data.shards.store import find_shards, open_shards
from declip_cli.errors import DataError


def write_tar(path, members, *, format=tarfile.PAX_FORMAT):
    """Write a tar with the standard library: members are (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(numbers):
    return [
        member
        for number in numbers
        for member in ((f"{number:04d}.jpg", b"image %d" % number), (f"{number:04d}.txt", b"text %d" % number))
    ]


def test_samples_of_foreign_tars_are_read_by_number(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(3)))
    write_tar(tmp_path / "b.tar", pairs(range(3, 5)))
    store = open_shards([str(tmp_path)])
    assert len(store) == 5
    for number in (4, 0, 3, 2, 1):
        sample = store.read(number)
        assert sample.key == f"{number:04d}"
        assert sample.image == b"image %d" % number
        assert sample.captions == (f"text {number}",)
    for number in (-1, 5):
        with pytest.raises(IndexError):
            store.read(number)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names_are_read_in_every_tar_format(tmp_path, format):
    folder = "f" * 90 if format == tarfile.USTAR_FORMAT else "ordnung/é" * 40
    members = [(f"{folder}/{n}.jpg", b"p") for n in range(1)] + [(f"{folder}/0.txt", b"t")]
    write_tar(tmp_path / "a.tar", [*members, *pairs([7])], format=format)
    store = open_shards([str(tmp_path / "a.tar")])
    assert [store.read(number).key for number in range(2)] == [f"{folder}/0", "0007"]


def test_captions_come_from_json_or_text(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.jpg", b"p"),
            ("0.txt", b"first"),
            ("0.json", json.dumps({"captions": ["first", "second"]}).encode()),
            ("1.png", b"p"),
            ("1.json", json.dumps({"caption": "only", "width": 5}).encode()),
            ("2.jpg", b"p"),
            ("2.json", json.dumps({"width": 5}).encode()),
            ("2.txt", b"\xef\xbb\xbfwith a mark"),
            ("3.jpg", b"p"),
            ("3.cls", b"7"),
            ("3.txt", b"three"),
        ],
    )
    store = open_shards([str(tmp_path / "a.tar")])
    captions = [store.read(number).captions for number in range(4)]
    assert captions == [("first", "second"), ("only",), ("with a mark",), ("three",)]


def test_missing_extra_and_duplicate_members_are_counted(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            *pairs([0]),
            ("1.jpg", b"p"),
            ("2.txt", b"t"),
            *pairs([3]),
            ("README.md", b"hello"),
            ("0000.jpg", b"again"),
            ("0000.txt", b"again"),
            ("../../etc/passwd.jpg", b"p"),
            ("/etc/passwd.txt", b"p"),
            ("._0004.jpg", b"mac"),
            *pairs([4]),
        ],
    )
    store = open_shards([str(tmp_path / "a.tar")])
    assert [store.read(n).key for n in range(len(store))] == ["0000", "0003", "0004"]
    assert store.skipped == {
        "missing caption": (1, "1"),
        "missing image": (2, "2"),
        "duplicate key": (1, "0000"),
        "path traversal": (2, "../../etc/passwd.jpg"),
    }


@pytest.mark.parametrize(("cut", "num_left"), [(512 * 6 + 100, 1), (512 * 4 + 3, 1), (512 * 8, 2), (1000, 0)])
def test_a_truncated_tar_gives_what_is_whole_and_says_so(tmp_path, cut, num_left):
    path = write_tar(tmp_path / "a.tar", pairs(range(5)), format=tarfile.USTAR_FORMAT)
    write_tar(tmp_path / "b.tar", pairs([9]))
    path.write_bytes(path.read_bytes()[:cut])
    store = open_shards([str(tmp_path)])
    assert len(store) == num_left + 1
    assert store.skipped["truncated tar"] == (1, str(path))


def test_a_damaged_header_stops_its_tar_only(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(5)), format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[512 * 8 + 20] ^= 1  # in the header of the third image
    path.write_bytes(data)
    store = open_shards([str(path)])
    assert len(store) == 2
    assert store.skipped == {"damaged tar": (1, str(path))}


def test_the_index_is_kept_beside_and_made_again_when_the_shard_changes(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    first = open_shards([str(path)])
    index = tmp_path / "a.index"
    stamp = index.stat().st_mtime_ns
    assert open_shards([str(path)]).fingerprint == first.fingerprint
    assert index.stat().st_mtime_ns == stamp
    write_tar(path, pairs(range(90)))
    assert len(open_shards([str(path)])) == 90


def test_the_index_goes_to_the_cache_where_the_folder_is_write_protected(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert len(open_shards([str(path)], cache_dir=str(tmp_path / "cache"))) == 3
    assert not (tmp_path / "a.index").exists()
    assert len(list((tmp_path / "cache" / "indexes").glob("*.index"))) == 1


def test_a_shard_that_was_cut_off_under_its_index_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)), format=tarfile.USTAR_FORMAT)
    store = open_shards([str(path)])
    path.write_bytes(path.read_bytes()[: 512 * 8])
    assert store.read(0).key == "0000"
    with pytest.raises(DataError, match="ends before byte 5,638") as caught:
        store.read(2)
    assert caught.value.cause == "truncated tar"
    path.unlink()
    assert store.read(0).key == "0000"  # the file is still open
    with pytest.raises(DataError, match="cannot read the shard") as caught:
        pickle.loads(pickle.dumps(open_shards([str(write_tar(path, pairs([1])))]))).read(path.unlink() or 0)
    assert caught.value.cause == UNREAD


@pytest.mark.parametrize(
    ("text", "cause"), [(b"caf\xe9", "caption not UTF-8"), (b" \n", "empty caption"), (b"", "empty caption")]
)
def test_unusable_captions_have_their_cause(tmp_path, text, cause):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"p"), ("0.txt", text)])
    with pytest.raises(DataError) as caught:
        open_shards([str(tmp_path / "a.tar")]).read(0)
    assert caught.value.cause == cause


def test_more_shards_than_open_files_and_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("declip_cli.data.shards.files._MAX_OPEN", 2)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", pairs([2 * shard, 2 * shard + 1]))
    store = open_shards([str(tmp_path / "{0..7}.tar")])
    wrong = []

    def read(start):
        for step in range(200):
            number = (start + 5 * step) % 16
            if store.read(number).image != b"image %d" % number:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_fingerprint_changes_with_pairs_and_order(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(3)))
    write_tar(tmp_path / "b.tar", pairs(range(3, 6)))
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    prints = {open_shards(paths).fingerprint for paths in ([a], [b], [a, b], [b, a])}
    assert len(prints) == 4
    assert open_shards([a, b]).fingerprint in prints


def test_patterns_are_spelled_out_in_order_and_missing_shards_named(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"s{number:03d}.tar", pairs([number]))
    names = [str(tmp_path / f"s{number:03d}.tar") for number in (8, 9, 10)]
    assert [shard.path for shard in find_shards(str(tmp_path / "s{008..010}.tar"))[0]] == names
    assert [shard.path for shard in find_shards(str(tmp_path / "*.tar"))[0]] == names
    with pytest.raises(DataError, match=r"s011.tar \(1 of 4 are missing\)"):
        find_shards(str(tmp_path / "s{008..011}.tar"))


def test_folders_without_shards_say_how_to_make_some(tmp_path):
    with pytest.raises(DataError, match="no .tar shards") as caught:
        open_shards([str(tmp_path)])
    assert f"declip prepare {tmp_path} --out" in caught.value.remedy
    write_tar(tmp_path / "a.tar", [("0.jpg", b"p")])
    with pytest.raises(DataError, match=r"no image-text pair .*missing caption: 1, first 0"):
        open_shards([str(tmp_path)])
    (tmp_path / "list.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is not a .tar shard"):
        open_shards([str(tmp_path / "list.csv")])
    with pytest.raises(DataError, match="has no split 'val'"):
        open_shards([str(tmp_path)], split="val")


def test_a_prepared_folder_with_a_damaged_shard_is_refused(tmp_path):
    write_tar(tmp_path / "00000.tar", pairs([0]))
    shard = {"name": "00000.tar", "num_pairs": 1, "num_bytes": 77, "sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [shard]}))
    with pytest.raises(DataError, match="instead of 77"):
        open_shards([str(tmp_path)])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(DataError, match="is missing"):
        open_shards([str(tmp_path)])
    for content in (
        "{",
        "[" * 50_000,
        "[]",
        '{"shards": [3]}',
        '{"shards": [{"name": 1, "num_bytes": 1, "sha256": ""}]}',
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest.json is damaged"):
            open_shards([str(tmp_path)])


def test_a_local_read_is_tried_again_with_a_new_handle(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    store = open_shards([str(path)])
    monkeypatch.setattr(storage, "_WAITS_S", (0.0, 0.0))
    store.read(0)
    pread, stale = os.pread, []

    def read(number, num_bytes, offset):
        stale.append(number)
        if len(stale) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(number, num_bytes, offset)

    monkeypatch.setattr(os, "pread", read)
    assert store.read(1).key == "0001"
    assert len(stale) == 3


def test_members_that_are_too_big_are_counted_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("declip_cli.data.shards.tar_samples.MAX_MEMBER_BYTES", 50)
    write_tar(
        tmp_path / "a.tar", [*pairs([0]), ("1.jpg", bytes(51)), ("1.txt", b"t"), *pairs([2]), ("2.npy", bytes(99))]
    )
    store = open_shards([str(tmp_path / "a.tar")])
    assert [store.key(number) for number in range(len(store))] == ["0000", "0002"]
    assert store.skipped == {"too big": (1, "1"), "missing image": (1, "2")}


def test_one_read_gives_image_and_captions_unless_much_lies_between(tmp_path, monkeypatch):
    for gap in (1 << 10, 1 << 20):
        write_tar(tmp_path / f"{gap}.tar", [("0.jpg", b"image"), ("0.npy", bytes(gap)), ("0.txt", b"text")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *args: sizes.append(args[1]) or pread(*args))
    for gap in (1 << 10, 1 << 20):
        example = open_shards([str(tmp_path / f"{gap}.tar")]).read(0)
        assert (example.image, example.captions) == (b"image", ("text",))
    assert sizes == [512 + 512 + (1 << 10) + 512 + len(b"text"), len(b"image"), len(b"text")]


def test_captions_and_keys_are_had_without_the_image(tmp_path, monkeypatch):
    metadata = json.dumps({"captions": ["a", "b"], "width": 3}).encode()
    write_tar(tmp_path / "a.tar", [("0.jpg", bytes(9000)), ("0.txt", b"a"), ("0.json", metadata), *pairs([1])])
    store = open_shards([str(tmp_path / "a.tar")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *args: sizes.append(args[1]) or pread(*args))
    assert [store.key(number) for number in range(2)] == ["0", "0001"]
    assert sizes == []
    assert [store.captions(number) for number in range(2)] == [("a", "b"), ("text 1",)]
    assert max(sizes) == len(metadata)
