"""Indexes of shards: shared out among processes, vouched for by a digest, made again when damaged."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from declip_cli.data.shards import indexing
from declip_cli.data.shards.index import IndexBuilder, read_indexes, write_indexes
from declip_cli.data.shards.indexing import _share, find_index
from declip_cli.data.shards.store import find_shards, open_shards

ROOT = Path(__file__).parents[3]


def write_shard(path, num, *, key="a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(num):
            for name, data in ((f"{key}{number}.jpg", b"image %d" % number), (f"{key}{number}.txt", b"text")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def open_on_ranks(root, num_ranks):
    """Run opening_ranks.py in several processes; return what each found, by folder."""
    program = [sys.executable, "-m", "tests.data.shards.opening_ranks", str(root)]
    processes = [subprocess.Popen([*program, str(rank), str(num_ranks)], cwd=ROOT) for rank in range(num_ranks)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * num_ranks
    finally:
        for process in processes:
            process.kill()
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def test_processes_that_open_tars_together_index_each_once(tmp_path):
    num_ranks, trials = 4, 2
    for trial in range(trials):
        for shard in range(12):
            write_shard(tmp_path / f"trial-{trial}" / f"{shard:05d}.tar", 20)
    for shard in range(12):
        write_shard(tmp_path / "protected" / f"{shard:05d}.tar", 20)
        write_shard(tmp_path / "broken" / f"{shard:05d}.tar", 20)
    results = open_on_ranks(tmp_path, num_ranks)
    names = [f"{shard:05d}.tar" for shard in range(12)]
    for trial in range(trials):
        of_ranks = [result[f"trial-{trial}"] for result in results]
        assert all(result["found"] == of_ranks[0]["found"] for result in of_ranks)
        assert of_ranks[0]["found"][0] == 240
        assert sorted(sum((result["built"] for result in of_ranks), [])) == names
        assert {len(result["built"]) for result in of_ranks} == {12 // num_ranks}
    # Where the indexes go to a cache that two ranks share, as those of one machine do: once a machine.
    of_ranks = [result["protected"] for result in results]
    assert all(result["found"] == of_ranks[0]["found"] for result in of_ranks)
    for rank in range(0, num_ranks, 2):
        assert sorted(of_ranks[rank]["built"] + of_ranks[rank + 1]["built"]) == names
    # A shard that only rank 1 meets and cannot read: the same error everywhere.
    errors = {result["broken"]["error"] for result in results}
    assert len(errors) == 1
    assert "cannot read the shard" in errors.pop()
    assert not list(tmp_path.rglob("*.tmp"))


def test_shards_go_to_the_ranks_that_miss_them():
    assert _share([[0, 1, 2, 3], [0, 1, 2, 3]]) == [[0, 2], [1, 3]]
    assert _share([[], [4, 7], [4, 7]]) == [[], [4], [7]]
    assert _share([[1], [], []]) == [[1], [], []]


def test_progress_is_told_where_indexing_takes_long(tmp_path, monkeypatch):
    for name in ("_MEET_EVERY_S", "_SILENT_S", "_SAY_EVERY_S"):
        monkeypatch.setattr(indexing, name, 0.01)
    monkeypatch.setattr(indexing, "_THREADS", 1)
    make = indexing.make_index
    monkeypatch.setattr(indexing, "make_index", lambda *args, **options: (time.sleep(0.05), make(*args, **options))[1])
    for shard in range(4):
        write_shard(tmp_path / f"{shard}.tar", 2)
    said = []
    open_shards([str(tmp_path)], say=said.append)
    assert any("of 4 shards indexed, once for all" in line for line in said)
    said.clear()
    open_shards([str(tmp_path)], say=said.append)
    assert said == []


@pytest.mark.parametrize(
    "content", [b"", b"nonsense\n", b'{"version": 1, "tar_bytes": 10240, "skipped": {}}\n' + bytes(16)]
)
def test_an_index_that_is_none_or_an_old_one_is_made_again_and_that_is_said_once(tmp_path, content):
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", 4)
    open_shards([str(tmp_path)])
    whole = (tmp_path / "0.index").read_bytes()
    for shard in (0, 2):
        (tmp_path / f"{shard}.index").write_bytes(content)
    said = []
    assert len(open_shards([str(tmp_path)], say=said.append)) == 12
    assert len(said) == 1
    assert said[0].startswith(f"the index of 2 shards is made again ({tmp_path / '0.index'} is ")
    assert (tmp_path / "0.index").read_bytes() == whole


def damaged(data, rng):
    """Flip, cut, blank, insert or delete some bytes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 1, 8, 100)))
    how = rng.choice(("flip", "truncate", "zero", "insert", "delete"))
    if how == "flip":
        return data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]
    if how == "truncate":
        return data[:start]
    if how == "zero":
        return data[:start] + bytes(end - start) + data[end:]
    return data[:start] + (rng.randbytes(end - start) + data[start:] if how == "insert" else data[end:])


def test_a_damaged_index_is_never_believed(tmp_path):
    path = write_shard(tmp_path / "a.tar", 30)
    fingerprint = open_shards([str(path)]).fingerprint
    index = tmp_path / "a.index"
    whole, rng = index.read_bytes(), random.Random(0)
    for _ in range(40):
        content, said = damaged(whole, rng), []
        index.write_bytes(content)
        assert open_shards([str(path)], say=said.append).fingerprint == fingerprint
        assert len(said) == (content != whole)
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
    path = write_shard(tmp_path / "a.tar", 3)
    open_shards([str(path)])
    (shard,) = find_shards(str(path))
    assert find_index(shard, cache_dir=str(tmp_path)) == (str(tmp_path / "a.index"), "")
    assert find_index(replace(shard, num_bytes=7), cache_dir=str(tmp_path)) == ("", "")
    os.utime(path, ns=(1 << 62, 1 << 62))
    (shard,) = find_shards(str(path))
    assert find_index(shard, cache_dir=str(tmp_path)) == ("", "")


def test_many_indexes_become_one_file_for_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_MAX_MAPPED", 2)
    for shard in range(4):
        write_shard(tmp_path / f"{shard}.tar", 3 + shard, key=f"{shard}-")
    cache = tmp_path / "cache"
    opened = [open_shards([str(tmp_path)], cache_dir=str(cache)) for _ in range(2)]
    (joined,) = (cache / "indexes").glob("*.index")
    assert [[data.key(number) for number in range(len(data))] for data in opened] == [
        [f"{shard}-{number}" for shard in range(4) for number in range(3 + shard)]
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
