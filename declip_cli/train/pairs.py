"""Open the pairs that a run learns from, and say what about them decides how they are read."""

import os
from collections.abc import Callable, Sequence

from declip_cli.config import DataConfig
from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import BlockDataset, Dataset
from declip_cli.data.shards.dataset import BLOCK_BYTES, LazyShardDataset
from declip_cli.data.shards.files import Shard
from declip_cli.data.shards.indexing import lacks_index
from declip_cli.data.shards.store import default_cache_dir
from declip_cli.errors import DataError, require
from declip_cli.process_group import from_first
from declip_cli.resolve import DataFacts

_LARGE_BYTES = 100e9
"""What is larger is read in blocks, however much memory there is."""


def open_pairs(config: DataConfig, before: DataFacts | None, log: Callable[[str], None]) -> Dataset:
    """Open what a model is trained on; on several ranks, call it on each.

    Archives that nobody has indexed are opened without going through them, if they are read in blocks.

    Args:
        config: settings of the data.
        before: facts about the data of a run that is resumed.
        log: for notes.

    Returns:
        The pairs.

    Raises:
        DataError: they cannot be read, or are no pairs.
    """
    require(bool(config.path), "no data to train on", remedy="--data shards/ (made by declip prepare), or --data demo")

    def should_count(shards: Sequence[Shard]) -> bool:
        return before.is_counted if before is not None else from_first(lambda: _should_be_counted(config, shards))

    dataset = open_dataset(
        config.path,
        config.split or "train",
        cache_dir=config.cache_dir,
        cache_gb=config.cache_gb,
        log=log,
        should_count=should_count,
    )
    if isinstance(dataset, LazyShardDataset):
        num, guess = dataset.num_blocks, len(dataset)
        log(f"{num} archives without an index are read as they come: about {guess} pairs, an estimate")
    if not isinstance(dataset, BlockDataset):
        raise DataError(
            f"{dataset.name} holds images, a model is trained on shards",
            remedy=f"declip prepare {dataset.name} --out SHARDS, then --data SHARDS",
        )
    return dataset


def facts_of(samples: Dataset) -> DataFacts:
    """Say what the pairs add to a configuration."""
    is_lazy = isinstance(samples, LazyShardDataset)
    num_blocks = samples.num_blocks if isinstance(samples, BlockDataset) and not is_lazy else 0
    is_remote = isinstance(samples, BlockDataset) and samples.is_remote
    return DataFacts(
        num_pairs=len(samples),
        fingerprint=samples.fingerprint,
        num_blocks=num_blocks,
        suits_blocks=is_lazy or is_remote or _is_large(num_blocks * BLOCK_BYTES),
        is_counted=not is_lazy,
    )


def _should_be_counted(config: DataConfig, shards: Sequence[Shard]) -> bool:
    cache_dir = config.cache_dir or default_cache_dir()
    if config.order == "exact" or config.split not in (None, "train"):
        return True
    if not any(lacks_index(shard, cache_dir=cache_dir) for shard in shards):
        return True
    if config.order == "blocks" or any(shard.is_remote for shard in shards):
        return False
    return not _is_large(sum(shard.num_bytes for shard in shards))


def _is_large(num_bytes: float) -> bool:
    """Return whether so much should not be read here and there."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return num_bytes > min(memory / 2, _LARGE_BYTES)
