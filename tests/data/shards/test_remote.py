"""Shards behind a server that is slow, cuts off and fails: nothing is lost, and little is asked for."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from declip_cli.data import storage
from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import UNREAD
from declip_cli.data.prepare.process import Pair
from declip_cli.data.prepare.shard_writer import SplitWriter
from declip_cli.data.shards.files import BlockCache
from declip_cli.data.shards.indexing import lacks_index
from declip_cli.data.shards.store import find_shards, open_shards
from declip_cli.errors import DataError
from tests.data.shards.far_server import far_server
from tests.data.shards.test_store import pairs, write_tar

NUM_PAIRS, IMAGE_BYTES = 60, 20_000


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", (0.0, 0.01, 0.01))
    with far_server() as server:
        yield server


def image(number):
    return np.random.default_rng(number).bytes(IMAGE_BYTES)


@pytest.fixture
def prepared(tmp_path, far):
    """Three shards and a manifest on the server, as `declip prepare` leaves them; returns where."""
    folder = tmp_path / "prepared"
    writer = SplitWriter(str(folder), str(folder), shard_samples=25, state={})
    for number in range(NUM_PAIRS):
        writer.add(Pair(f"k{number}", (f"text {number}", "more"), image(number), (1, 1), (1, 1)))
    writer.finish_shard()
    manifest = {"shards": writer.shards, "index_sha256": writer.join_indexes()}
    storage.write_whole(str(folder / "manifest.json"), json.dumps(manifest).encode())
    for path in folder.iterdir():
        far.files[f"/set/{path.name}"] = path.read_bytes()
    return f"{far.url}/set"


def opened(url, tmp_path, **options):
    """Open shards with blocks of 0.2 MiB, of which a shard of 25 pairs has three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("declip_cli.data.shards.dataset.BLOCK_BYTES", int(0.2 * 2**20))
        return open_shards([url], cache_dir=str(tmp_path / "cache"), **options)


def opened_lazily(path, tmp_path):
    return open_shards([str(path)], cache_dir=str(tmp_path / "cache"), should_count=lambda shards: False)


def test_a_prepared_folder_opens_in_two_requests_and_then_in_one(tmp_path, far, prepared):
    data = open_shards([prepared], cache_dir=str(tmp_path / "cache"))
    assert [path for _, path, _ in far.asked] == ["/set/manifest.json", "/set/shards.index"]
    cache = str(tmp_path / "cache")
    as_in_training = {"should_count": lambda shards: not any(lacks_index(shard, cache_dir=cache) for shard in shards)}
    assert len(open_dataset([prepared], "train", cache_dir=cache, **as_in_training)) == NUM_PAIRS
    assert far.num_asked == 3
    assert [data.key(number) for number in (0, 59)] == ["000000000", "000000059"]
    assert data.fingerprint == open_shards([str(tmp_path / "prepared")]).fingerprint
    data.labels = [3] * NUM_PAIRS
    again = pickle.loads(pickle.dumps(data))
    assert (len(again), again.labels, again.name) == (NUM_PAIRS, data.labels, prepared)
    assert far.num_asked == 3


def test_a_block_is_one_request_and_its_pairs_ask_for_nothing(tmp_path, far, prepared):
    data = opened(prepared, tmp_path)
    assert data.is_remote
    assert data.block_firsts.tolist() == [0, 8, 16, 25, 33, 41, 50, 55, 60]
    far.asked.clear()
    for block in range(len(data.block_firsts) - 1):
        data.fetch(block)
    assert far.num_asked == 8
    for number in range(NUM_PAIRS):
        example = data.read(number)
        assert (example.image, example.captions) == (image(number), (f"text {number}", "more"))
        assert data.captions(number) == example.captions
    data.fetch(3)
    assert len(opened(prepared, tmp_path).read(59).image) == IMAGE_BYTES
    assert [request for request in far.asked if ".tar" in request[1]] == far.asked[:8]


def test_a_pair_waits_for_its_block_that_is_being_fetched(tmp_path, far, prepared):
    data = opened(prepared, tmp_path)
    far.faults.append("late")
    far.asked.clear()
    fetcher = threading.Thread(target=data.fetch, args=(0,))
    fetcher.start()
    while not far.asked:
        time.sleep(0.01)
    assert data.read(1).image == image(1)
    fetcher.join()
    assert far.num_asked == 1


def test_a_pair_of_no_fetched_block_is_one_request(tmp_path, far, prepared):
    data = opened(prepared, tmp_path)
    far.asked.clear()
    assert data.read(30).image == image(30)
    assert far.num_asked == 1
    (start, end) = map(int, far.asked[0][2].removeprefix("bytes=").split("-"))
    assert IMAGE_BYTES < end - start + 1 < IMAGE_BYTES + 3000


@pytest.mark.parametrize("fault", ["busy", "hang up", "half", "half, as if whole", "late"])
def test_a_store_that_recovers_costs_nothing(tmp_path, far, prepared, fault):
    data = opened(prepared, tmp_path)
    far.faults += [fault] * 2
    data.fetch(2)
    far.faults += [fault] * 2
    assert [data.read(number).image for number in (16, 40)] == [image(16), image(40)]


def test_a_store_that_stays_away_is_no_fault_of_the_pair(tmp_path, far, prepared):
    data = opened(prepared, tmp_path)
    far.faults += ["busy"] * 8
    for work in (lambda: data.fetch(1), lambda: data.read(1)):
        with pytest.raises(DataError, match=r"cannot read http.*00000.tar: 503") as caught:
            work()
        assert caught.value.cause == UNREAD
    far.faults.clear()
    assert data.read(1).image == image(1)
    assert not [name for name in os.listdir(tmp_path / "cache" / "blocks") if name.endswith(".tmp")]
    del far.files["/set/00001.tar"]
    with pytest.raises(DataError, match="cannot read the shard") as caught:
        data.read(30)
    assert caught.value.cause == UNREAD


def test_a_damaged_copy_of_the_index_is_fetched_again_and_a_damaged_original_done_without(tmp_path, far, prepared):
    fingerprint = open_shards([prepared], cache_dir=str(tmp_path / "cache")).fingerprint
    (copy,) = (tmp_path / "cache" / "indexes").glob("*.index")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
    assert open_shards([prepared], cache_dir=str(tmp_path / "cache")).fingerprint == fingerprint
    far.files["/set/shards.index"] = whole[:99] + bytes([whole[99] ^ 4]) + whole[100:]
    given = []
    data = open_shards([prepared], cache_dir=str(tmp_path / "other"), log=given.append)
    assert data.fingerprint == fingerprint
    assert given == [f"{prepared}/shards.index is damaged: rows have changed; the indexes of the shards are used"]


@pytest.mark.parametrize("fault", ["busy", "hang up"])
def test_a_fault_is_not_taken_for_a_file_that_is_not_there(far, monkeypatch, fault):
    monkeypatch.setattr(storage, "_WAITS_S", (0.0, 0.0))
    far.files["/a.tar"] = b"abc"
    far.fails_heads = True
    for look, there in ((storage.is_file, True), (lambda path: storage.facts(path).num_bytes, 3)):
        far.faults[:] = [fault] * 3
        assert look(f"{far.url}/a.tar") == there
        far.faults[:] = [fault] * 99
        with pytest.raises(DataError, match="cannot read http") as caught:
            look(f"{far.url}/a.tar")
        assert caught.value.cause == UNREAD
    far.faults.clear()
    assert not storage.is_file(f"{far.url}/b.tar")
    with pytest.raises(FileNotFoundError):
        storage.facts(f"{far.url}/b.tar")


def test_archives_that_nobody_indexed_are_read_when_their_turn_comes(tmp_path, far):
    for shard in range(3):
        path = write_tar(tmp_path / f"{shard}.tar", [*pairs(range(10 * shard, 10 * shard + 4 + shard)), ("x.jpg", b"")])
        far.files[f"/{shard}.tar"] = path.read_bytes()
    url, cache = f"{far.url}/{{0..2}}.tar", str(tmp_path / "cache")
    assert all(lacks_index(shard, cache_dir=cache) for shard in find_shards(url)[0])
    far.asked.clear()
    data = opened_lazily(url, tmp_path)
    assert {method for method, _, _ in far.asked} == {"HEAD"}
    assert [data.count(shard) for shard in (2, 0)] == [6, 4]
    data.fetch(1)
    assert len([1 for method, _, wanted in far.asked if method == "GET" and wanted]) == 3
    again = pickle.loads(pickle.dumps(data))
    far.asked.clear()
    for each in (data, again):
        for shard in range(3):
            assert [each.read(shard << 32 | row).captions for row in range(4)] == [
                (f"text {10 * shard + row}",) for row in range(4)
            ]
        with pytest.raises(IndexError):
            each.read(4)
    data.release(1)
    assert far.asked == []
    assert data.skipped == {"missing caption": (3, "x")}
    assert data.fingerprint == again.fingerprint
    assert not any(lacks_index(shard, cache_dir=cache) for shard in find_shards(url)[0])


def test_the_number_of_pairs_is_estimated_from_what_img2dataset_says(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"{shard:05d}.tar", pairs(range(5)))
    by_size = opened_lazily(tmp_path, tmp_path)
    assert len(by_size) == 20
    for shard in (0, 1):
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": 30}))
    (tmp_path / "00002_stats.json").write_text("[")
    assert len(opened_lazily(tmp_path, tmp_path)) == 120


def test_a_first_archive_without_pairs_does_not_make_the_estimate_none(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"{shard:05d}.tar", pairs(range(5)) if shard else [("a.txt", b"no image" * 1000)])
    assert len(opened_lazily(tmp_path, tmp_path)) >= 15


def test_local_archives_are_read_where_the_system_takes_no_advice(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.delattr(os, "POSIX_FADV_WILLNEED", raising=False)
    write_tar(tmp_path / "0.tar", pairs(range(5)))
    data = opened_lazily(tmp_path, tmp_path)
    data.fetch(0)
    assert data.count(0) == 5


def kept(cache_dir):
    return {path.name for path in cache_dir.iterdir() if "." not in path.name} - {"bytes"}


def bytes_in(cache_dir):
    return sum(path.stat().st_size for path in cache_dir.iterdir() if "bytes" not in path.name)


def test_what_is_released_goes_first_then_what_is_oldest(tmp_path):
    cache = BlockCache(str(tmp_path), bound_bytes=1010)
    for number, name in enumerate("abcd"):
        cache.fetch(name, 230, [bytes(230)])
        os.utime(tmp_path / name, (number + 1, number + 1))
    cache.release("c")
    for name, left in (("e", "abde"), ("f", "bdef"), ("g", "defg")):
        cache.fetch(name, 230, [bytes(100), bytes(130)])
        assert kept(tmp_path) == set(left)
    cache.fetch("too big", 1011, [])
    assert kept(tmp_path) == set("defg")
    (tmp_path / "bytes").write_text("nonsense")
    cache.fetch("h", 230, [bytes(230)])
    assert kept(tmp_path) == set("efgh")


def test_the_bound_holds_while_many_write_and_after_one_was_killed(tmp_path):
    (tmp_path / "killed.1-1.tmp").write_bytes(bytes(400))
    os.utime(tmp_path / "killed.1-1.tmp", (1, 1))
    most, caches = [], [BlockCache(str(tmp_path), bound_bytes=1000) for _ in range(4)]

    def download(size):
        most.append(bytes_in(tmp_path))
        yield bytes(size)

    def work(cache, first):
        for number in range(first, first + 20):
            cache.fetch(f"{number % 30}", 90 + number, download(90 + number))

    threads = [threading.Thread(target=work, args=(cache, 5 * number)) for number, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < max(most) <= 1000
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("[0-9]*.lock"))


_FETCH = """
import sys, time
from declip_cli.data.shards.files import BlockCache
def download():
    with open(sys.argv[2], "a") as log:
        log.write("downloaded\\n")
    time.sleep(0.3)
    yield b"abc"
cache = BlockCache(sys.argv[1], bound_bytes=1000)
cache.fetch("block", 3, download())
assert open(cache.path("block"), "rb").read() == b"abc"
"""


def test_two_processes_download_a_block_once(tmp_path):
    program = [sys.executable, "-c", _FETCH, str(tmp_path / "cache"), str(tmp_path / "log")]
    processes = [subprocess.Popen(program) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "downloaded\n"


@pytest.mark.parametrize("how", ["disk full", "no folder", "no room"])
def test_a_cache_that_cannot_be_written_costs_requests_and_no_pair(tmp_path, far, prepared, monkeypatch, how):
    data = opened(prepared, tmp_path, cache_gb=1e-6 if how == "no room" else 1.0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if how == "no folder":
        (tmp_path / "cache" / "blocks").write_text("in the way")
    if how == "disk full":
        monkeypatch.setattr(BlockCache, "_fill", full)
    data.fetch(0)
    assert [data.read(number).image for number in range(8)] == [image(number) for number in range(8)]
    data.release(0)
