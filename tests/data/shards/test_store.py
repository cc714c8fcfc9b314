import errno
import io
import json
import os
import tarfile
import threading

import fsspec
import pytest

from declip_cli.data.samples import UNREAD
from declip_cli.data.shards import files
from declip_cli.data.shards.store import find_shards
from declip_cli.data.stores import open_samples
from declip_cli.errors import DataError


def write_tar(path, members, *, format=tarfile.PAX_FORMAT):
    """Write a tar with the standard library: members are (name, bytes)."""
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
        for member in ((f"{number:04d}.jpg", b"picture %d" % number), (f"{number:04d}.txt", b"text %d" % number))
    ]


def test_samples_of_foreign_tars_are_read_by_number(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(3)))
    write_tar(tmp_path / "b.tar", pairs(range(3, 5)))
    store = open_samples([str(tmp_path)])
    assert len(store) == 5
    for number in (4, 0, 3, 2, 1):
        sample = store.read(number)
        assert sample.key == f"{number:04d}"
        assert sample.image == b"picture %d" % number
        assert sample.captions == (f"text {number}",)
    for number in (-1, 5):
        with pytest.raises(IndexError):
            store.read(number)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names_are_read_in_every_tar_format(tmp_path, format):
    folder = "f" * 90 if format == tarfile.USTAR_FORMAT else "ordnung/é" * 40
    members = [(f"{folder}/{n}.jpg", b"p") for n in range(1)] + [(f"{folder}/0.txt", b"t")]
    write_tar(tmp_path / "a.tar", [*members, *pairs([7])], format=format)
    store = open_samples([str(tmp_path / "a.tar")])
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
    store = open_samples([str(tmp_path / "a.tar")])
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
    store = open_samples([str(tmp_path / "a.tar")])
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
    store = open_samples([str(tmp_path)])
    assert len(store) == num_left + 1
    assert store.skipped["truncated tar"] == (1, str(path))


def test_a_damaged_header_stops_its_tar_only(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(5)), format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[512 * 8 + 20] ^= 1  # in the header of the third picture
    path.write_bytes(data)
    store = open_samples([str(path)])
    assert len(store) == 2
    assert store.skipped == {"damaged tar": (1, str(path))}


def test_the_index_is_kept_beside_and_made_again_when_the_shard_changes(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    first = open_samples([str(path)])
    index = tmp_path / "a.index"
    stamp = index.stat().st_mtime_ns
    assert open_samples([str(path)]).fingerprint == first.fingerprint
    assert index.stat().st_mtime_ns == stamp
    write_tar(path, pairs(range(90)))
    assert len(open_samples([str(path)])) == 90


def test_the_index_goes_to_the_cache_where_the_folder_is_write_protected(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert len(open_samples([str(path)], cache_dir=str(tmp_path / "cache"))) == 3
    assert not (tmp_path / "a.index").exists()
    assert len(list((tmp_path / "cache" / "indexes").glob("*.index"))) == 1


def test_a_sample_that_changed_under_the_index_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)), format=tarfile.USTAR_FORMAT)
    store = open_samples([str(path)])
    data = bytearray(path.read_bytes())
    data[512 * 4] ^= 1
    path.write_bytes(data)
    assert store.read(0).key == "0000"
    with pytest.raises(DataError, match="has changed or is damaged") as caught:
        store.read(1)
    assert caught.value.cause == "damaged tar"
    path.write_bytes(data[:600])
    with pytest.raises(DataError):
        store.read(2)


@pytest.mark.parametrize(
    ("text", "cause"), [(b"caf\xe9", "caption not UTF-8"), (b" \n", "empty caption"), (b"", "empty caption")]
)
def test_unusable_captions_have_their_cause(tmp_path, text, cause):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"p"), ("0.txt", text)])
    with pytest.raises(DataError) as caught:
        open_samples([str(tmp_path / "a.tar")]).read(0)
    assert caught.value.cause == cause


def test_more_shards_than_open_files_and_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("declip_cli.data.shards.files._MAX_OPEN", 2)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", pairs([2 * shard, 2 * shard + 1]))
    store = open_samples([str(tmp_path / "{0..7}.tar")])
    wrong = []

    def read(start):
        for step in range(200):
            number = (start + 5 * step) % 16
            if store.read(number).image != b"picture %d" % number:
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
    prints = {open_samples(paths).fingerprint for paths in ([a], [b], [a, b], [b, a])}
    assert len(prints) == 4
    assert open_samples([a, b]).fingerprint in prints


def test_patterns_are_spelled_out_in_order_and_missing_shards_named(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"s{number:03d}.tar", pairs([number]))
    names = [str(tmp_path / f"s{number:03d}.tar") for number in (8, 9, 10)]
    assert find_shards(str(tmp_path / "s{008..010}.tar")) == names
    assert find_shards(str(tmp_path / "*.tar")) == names
    with pytest.raises(DataError, match=r"s011.tar \(1 of 4 are missing\)"):
        find_shards(str(tmp_path / "s{008..011}.tar"))


def test_folders_without_shards_say_how_to_make_some(tmp_path):
    with pytest.raises(DataError, match="no .tar shards") as caught:
        open_samples([str(tmp_path)])
    assert f"declip prepare {tmp_path} --out" in caught.value.remedy
    write_tar(tmp_path / "a.tar", [("0.jpg", b"p")])
    with pytest.raises(DataError, match=r"no image-text pair .*missing caption: 1, first 0"):
        open_samples([str(tmp_path)])
    (tmp_path / "list.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is not a .tar shard"):
        open_samples([str(tmp_path / "list.csv")])
    with pytest.raises(DataError, match="has no part 'val'"):
        open_samples([str(tmp_path)], part="val")


def test_a_prepared_folder_with_a_damaged_shard_is_refused(tmp_path):
    write_tar(tmp_path / "00000.tar", pairs([0]))
    shard = {"name": "00000.tar", "num_pairs": 1, "num_bytes": 77, "sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [shard]}))
    with pytest.raises(DataError, match="instead of 77"):
        open_samples([str(tmp_path)])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(DataError, match="is missing"):
        open_samples([str(tmp_path)])
    for content in (
        "{",
        "[" * 50_000,
        "[]",
        '{"shards": [3]}',
        '{"shards": [{"name": 1, "num_bytes": 1, "sha256": ""}]}',
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest.json is damaged"):
            open_samples([str(tmp_path)])


def test_remote_shards_are_fetched_piece_by_piece_and_once(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.makedirs("/far", exist_ok=True)
    for shard in range(2):
        path = write_tar(tmp_path / f"{shard}.tar", pairs(range(5 * shard, 5 * shard + 5)))
        fs.put(str(path), f"/far/{shard}.tar")
    asked = []
    cat_file = type(fs).cat_file

    def counted(self, path, start=None, end=None, **options):
        asked.append(end - start)
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(fs), "cat_file", counted)
    cache = str(tmp_path / "cache")
    store = open_samples(["memory://far/{0..1}.tar"], cache_dir=cache)
    assert asked == []
    for _ in range(2):
        assert [store.read(n).captions for n in (7, 0, 9)] == [("text 7",), ("text 0",), ("text 9",)]
    assert len(asked) == 3
    assert all(num_bytes <= 4 * 512 for num_bytes in asked)
    again = open_samples(["memory://far/{0..1}.tar"], cache_dir=cache)
    assert [again.read(n).captions for n in (0, 1)] == [("text 0",), ("text 1",)]
    assert len(asked) == 4
    assert again.fingerprint == store.fingerprint
    fs.rm("/far", recursive=True)
    with pytest.raises(DataError, match="cannot read the shard"):
        again.read(3)


class StoreError(Exception):
    """What a package for a store may raise: no OSError."""


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A remote shard of five pairs; `far.failures` is how many of the next reads fail, and `far.num_asked` counts."""
    fs = fsspec.filesystem("memory")
    fs.makedirs("/far", exist_ok=True)
    fs.put(str(write_tar(tmp_path / "a.tar", pairs(range(5)))), "/far/a.tar")
    cat_file = type(fs).cat_file

    class Far:
        url, failures, num_asked, answer = "memory://far/a.tar", 0, 0, staticmethod(lambda data: data)

    def fails_at_times(self, path, start=None, end=None, **options):
        Far.num_asked += 1
        Far.failures -= 1
        if Far.failures >= 0:
            raise StoreError("the connection was reset")
        return Far.answer(cat_file(self, path, start=start, end=end, **options))

    monkeypatch.setattr(type(fs), "cat_file", fails_at_times)
    monkeypatch.setattr(files, "_RETRY_AFTER_S", (0.0, 0.0, 0.0))
    yield Far
    fs.rm("/far", recursive=True)


@pytest.mark.parametrize("num_failures", [1, 3, 4])
def test_a_remote_read_is_tried_four_times(tmp_path, far, num_failures):
    store = open_samples([far.url], cache_dir=str(tmp_path / "cache"))
    far.failures = num_failures
    if num_failures < 4:
        assert store.read(2).captions == ("text 2",)
    else:
        with pytest.raises(DataError, match="cannot read the shard .* the connection was reset") as caught:
            store.read(2)
        assert caught.value.cause == UNREAD
    assert far.num_asked == min(4, num_failures + 1)


def test_half_an_answer_of_a_remote_store_is_asked_for_again(tmp_path, far):
    store = open_samples([far.url], cache_dir=str(tmp_path / "cache"))
    answers = [lambda data: data[:100], lambda data: data]
    far.answer = lambda data: answers.pop(0)(data)
    assert store.read(2).captions == ("text 2",)


@pytest.mark.parametrize("how", ["no space", "half a piece", "no folder"])
def test_a_cache_without_room_costs_no_pair(tmp_path, far, monkeypatch, how):
    if how == "no folder":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "shards").write_text("in the way")
    store = open_samples([far.url], cache_dir=str(tmp_path / "cache"))

    def write(number, piece, position):
        if how == "half a piece":
            return len(piece) // 2  # as the last write before the disk is full
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", write)
    for _ in range(2):
        assert [store.read(number).captions for number in range(5)] == [(f"text {n}",) for n in range(5)]
    assert far.num_asked == 10


def test_a_local_read_is_tried_again_with_a_new_handle(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    store = open_samples([str(path)])
    monkeypatch.setattr(files, "_RETRY_AFTER_S", (0.0, 0.0, 0.0))
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
