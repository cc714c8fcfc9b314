"""Indexes of shards: shared out among processes, vouched for by a digest, made again when damaged."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from declip_cli.data.shards import indexing
from declip_cli.data.shards.index import IndexBuilder, read_indexes, write_indexes
from declip_cli.data.shards.indexing import find_index
from declip_cli.data.shards.store import find_shards, open_shards
from declip_cli.errors import DataError
from tests.damage import damaged
from tests.data.shards.test_store import pairs, write_tar

NUM_PROCESSES = 4


@pytest.fixture
def built(monkeypatch):
    """The shards that were gone through; those with `broken` in their path cannot be."""
    names, index_groups = [], indexing.index_groups

    def counted(file, shard):
        if "broken" in shard:
            raise OSError("input/output error")
        names.append(Path(shard).name)
        return index_groups(file, shard)

    monkeypatch.setattr(indexing, "index_groups", counted)
    return names


def opened_at_once(folder, *, cache_of=lambda process: "cache"):
    """Open a folder several times at once; return the number of pairs and the fingerprint, or the error, of each."""

    def work(process):
        try:
            data = open_shards([str(folder)], cache_dir=str(folder.parent / cache_of(process)))
        except DataError as error:
            return error.message
        return len(data), data.fingerprint

    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        return list(pool.map(work, range(NUM_PROCESSES)))


def test_those_who_open_tars_at_once_index_each_once(tmp_path, built):
    names = [write_tar(tmp_path / "open" / f"{shard:05d}.tar", pairs(range(20))).name for shard in range(12)]
    found = opened_at_once(tmp_path / "open")
    assert found[0][0] == 240
    assert found == found[:1] * NUM_PROCESSES
    assert sorted(built) == names
    assert not [path for ending in ("tmp", "lock") for path in tmp_path.rglob(f"*.{ending}")]


def test_where_indexes_go_to_a_cache_each_machine_makes_them_once(tmp_path, built, monkeypatch):
    names = [write_tar(tmp_path / "protected" / f"{shard:05d}.tar", pairs(range(20))).name for shard in range(12)]
    monkeypatch.setattr(os, "access", lambda *args: False)
    found = opened_at_once(tmp_path / "protected", cache_of=lambda process: f"machine-{process // 2}")
    assert found == found[:1] * NUM_PROCESSES
    assert sorted(built) == sorted(2 * names)


def test_a_shard_that_cannot_be_read_is_an_error_for_all(tmp_path, built):
    for shard in range(12):
        write_tar(tmp_path / "broken" / f"{shard:05d}.tar", pairs(range(20)))
    messages = opened_at_once(tmp_path / "broken")
    assert len(messages) == NUM_PROCESSES
    assert all("cannot read the shard" in message for message in messages)


def test_a_rank_that_is_done_meets_those_that_are_not_until_all_are(tmp_path, monkeypatch):
    """What is between two meetings is short, though one rank takes four times as long as a collective may."""
    for shard in range(8):
        write_tar(tmp_path / "shards" / f"{shard}.tar", pairs(range(2)))
    here, barrier, values, make = (
        threading.local(),
        threading.Barrier(2, timeout=1.0),
        [False] * 2,
        indexing._make_index,
    )

    def from_all(value):
        values[here.rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    def make_slowly(*arguments):
        time.sleep(0.5)
        return make(*arguments)

    def work(rank):
        here.rank = rank
        return len(open_shards([folder], cache_dir=str(tmp_path / f"{rank}"), should_count=lambda shards: True))

    folder = str(tmp_path / "shards")
    monkeypatch.setattr(os, "access", lambda *args: False)
    open_shards([folder], cache_dir=str(tmp_path / "0"))
    monkeypatch.setattr("declip_cli.process_group.from_all", from_all)
    monkeypatch.setattr(indexing, "_make_index", make_slowly)
    monkeypatch.setattr(indexing, "_THREADS", 1)
    monkeypatch.setattr(indexing, "_LOG_EVERY_S", 0.0)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [16, 16]


def test_progress_is_told_where_indexing_takes_long(tmp_path, monkeypatch):
    make, given = indexing._make_index, []
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(2)))
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_LOG_EVERY_S", 0.01)
        patch.setattr(indexing, "_THREADS", 1)
        patch.setattr(indexing, "_make_index", lambda *args, **options: (time.sleep(0.05), make(*args, **options))[1])
        open_shards([str(tmp_path)], log=given.append)
    assert given[-2] == "3 of 4 shards indexed, once for all"
    given.clear()
    open_shards([str(tmp_path)], log=given.append)
    assert given == []


@pytest.mark.parametrize(
    "content", [b"", b"nonsense\n", b'{"version": 1, "tar_bytes": 10240, "skipped": {}}\n' + bytes(16)]
)
def test_an_index_that_is_none_or_an_old_one_is_made_again_and_that_is_said_once(tmp_path, content):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(4)))
    open_shards([str(tmp_path)])
    whole = (tmp_path / "0.index").read_bytes()
    for shard in (0, 2):
        (tmp_path / f"{shard}.index").write_bytes(content)
    given = []
    assert len(open_shards([str(tmp_path)], log=given.append)) == 12
    assert len(given) == 1
    assert given[0].startswith(f"the index of 2 shards was made again ({tmp_path / '0.index'} is ")
    assert (tmp_path / "0.index").read_bytes() == whole


def test_a_damaged_index_is_never_believed(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(30)))
    fingerprint = open_shards([str(path)]).fingerprint
    index = tmp_path / "a.index"
    whole, rng = index.read_bytes(), random.Random(0)
    for _ in range(40):
        content, given = damaged(whole, rng), []
        index.write_bytes(content)
        assert open_shards([str(path)], log=given.append).fingerprint == fingerprint
        assert len(given) == (content != whole)
        assert index.read_bytes() == whole


@pytest.mark.parametrize("span", [(10240, 1), (512, 10240), (0, 10241), (1 << 40, 100)])
def test_spans_outside_the_tar_are_refused_even_with_the_right_digest(tmp_path, span):
    for image, caption in ((span, (0, 4)), ((0, 4), span)):
        builder = IndexBuilder()
        builder.add("a", image, caption, is_json=True)
        write_indexes(str(tmp_path / "a.index"), [builder.build("a.tar", 10240)])
        with pytest.raises(ValueError, match="behind the end"):
            read_indexes(str(tmp_path / "a.index"), check=True)


def test_an_index_older_than_its_shard_or_of_another_size_is_not_used(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(3)))
    open_shards([str(path)])
    ((shard,), _) = find_shards(str(path))
    assert find_index(shard, cache_dir=str(tmp_path)) == (str(tmp_path / "a.index"), "")
    assert find_index(replace(shard, num_bytes=7), cache_dir=str(tmp_path)) == ("", "")
    os.utime(path, ns=(1 << 62, 1 << 62))
    ((shard,), _) = find_shards(str(path))
    assert find_index(shard, cache_dir=str(tmp_path)) == ("", "")


def test_many_indexes_become_one_file_for_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_MAX_MAPPED", 2)
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(10 * shard, 11 * shard + 3)))
    cache = tmp_path / "cache"
    opened = [open_shards([str(tmp_path)], cache_dir=str(cache)) for _ in range(2)]
    (joined,) = (cache / "indexes").glob("*.index")
    assert [[data.key(number) for number in range(len(data))] for data in opened] == [
        [f"{number:04d}" for shard in range(4) for number in range(10 * shard, 11 * shard + 3)]
    ] * 2
    assert opened[0].fingerprint == opened[1].fingerprint
    monkeypatch.setattr(indexing, "find_index", None)  # what is beside the shards is not asked for again
    whole = joined.read_bytes()
    assert len(open_shards([str(tmp_path)], cache_dir=str(cache))) == 18
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "_MAX_MAPPED", 2)
    joined.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert open_shards([str(tmp_path)], cache_dir=str(cache)).fingerprint == opened[0].fingerprint
    assert joined.read_bytes() == whole
