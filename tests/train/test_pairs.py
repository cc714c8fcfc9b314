"""Pairs are opened as the run that reads them asks, and reads them as it did before it was interrupted."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from declip_cli.config import DataConfig
from declip_cli.data.shards.dataset import LazyShardDataset, ShardDataset
from declip_cli.errors import ConfigError
from declip_cli.presets import resolve_data
from declip_cli.train import pairs
from declip_cli.train.pairs import facts_of, open_pairs
from declip_cli.train.run_dir import RunDir
from tests.train.small_runs import metrics, run, small_config
from tests.train.test_resume import stop_after


@pytest.fixture
def archives(tmp_path):
    """A folder of archives that nobody has indexed."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for shard in range(6):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(10 + shard):
                pixels = np.random.default_rng(100 * shard + number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                for name, data in ((f"{number}.png", file.getvalue()), (f"{number}.txt", b"a dog %d" % number)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def data_of(folder, tmp_path, **changes):
    return {"path": [str(folder)], "split": None, "cache_dir": str(tmp_path / "cache"), **changes}


def opened(settings, before=None):
    settings = settings | {"path": tuple(settings["path"])}
    return open_pairs(DataConfig(**settings), before, lambda message: None)


def test_archives_without_an_index_are_read_as_they_come_in_blocks(archives, tmp_path):
    samples = opened(data_of(archives, tmp_path, order="blocks"))
    assert isinstance(samples, LazyShardDataset)
    assert len(samples._counts) <= 1
    facts = facts_of(samples)
    assert (facts.is_counted, facts.suits_blocks) == (False, True)
    assert abs(facts.num_pairs - sum(range(10, 16))) <= 15
    assert isinstance(opened(data_of(archives, tmp_path, order="blocks"), facts), LazyShardDataset)


def test_small_archives_are_indexed_first_and_shuffled_exactly(archives, tmp_path):
    samples = opened(data_of(archives, tmp_path))
    assert isinstance(samples, ShardDataset)
    facts = facts_of(samples)
    assert (facts.num_pairs, facts.is_counted, facts.suits_blocks) == (75, True, False)
    assert isinstance(opened(data_of(archives, tmp_path, order="blocks"), facts), ShardDataset)


def test_archives_larger_than_the_memory_are_read_as_they_come(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "_LARGE_BYTES", 1000)
    assert isinstance(opened(data_of(archives, tmp_path)), LazyShardDataset)
    assert isinstance(opened(data_of(archives, tmp_path, order="exact")), ShardDataset)


@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_run_in_blocks_that_was_interrupted_ends_as_one_that_was_not(archives, tmp_path, monkeypatch, is_indexed):
    if is_indexed:
        opened(data_of(archives, tmp_path, order="exact"))  # leaves indexes beside the archives
    copy = shutil.copytree(archives, tmp_path / "copy")  # the first run would leave indexes for the second
    notes = []
    run(small_config(data=data_of(copy, copy, order="blocks", open_blocks=2)), tmp_path / "whole", notes=notes)
    sentence = "shuffled among at least 2 blocks" if is_indexed else "6 archives without an index are read as they come"
    assert any(sentence in note for note in notes)
    config = small_config(data=data_of(archives, tmp_path, order="blocks", open_blocks=2))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped", is_resumed=True)
    keys = ("step", "losses")
    wanted, found = ([{k: line[k] for k in keys} for line in metrics(tmp_path / n)] for n in ("whole", "stopped"))
    assert found == wanted
    states = [RunDir(tmp_path / name).load_state() for name in ("whole", "stopped")]
    assert states[0].values["stream"]["order"] == states[1].values["stream"]["order"]
    assert states[0].values["stream"]["order"]["kind"] == ("blocks" if is_indexed else "shards")
    for name, value in states[0].tensors["method"].items():
        assert torch.equal(states[1].tensors["method"][name], value), name
    resolved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (resolved["config"]["data"]["order"], resolved["run"]["is_counted"]) == ("blocks", is_indexed)


@pytest.mark.parametrize(
    ("num_blocks", "global_batch", "streams"), [(10_000, 1024, 64), (10_000, 96, 32), (100, 256, 8), (3, 256, 1)]
)
def test_streams_divide_the_batch_and_have_blocks_enough(num_blocks, global_batch, streams):
    settled = resolve_data(DataConfig(), num_blocks, global_batch, suits_blocks=True)
    assert (settled.order, settled.streams) == ("blocks", streams)
    assert resolve_data(DataConfig(streams=5), num_blocks, global_batch, suits_blocks=False).streams == 5


def test_without_data_nothing_is_opened():
    with pytest.raises(ConfigError, match="no data to train on"):
        opened({"path": []})
