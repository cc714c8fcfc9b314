"""Rows of a batch, filled where the stream says: in line or by threads."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.dataset import BlockDataset, Dataset
from declip_cli.data.image_views import ImageViews
from declip_cli.data.order import BlockOrder, ExactOrder, Order, ShardOrder
from declip_cli.data.pair_views import BadSample, PairViews, UnreadablePair
from declip_cli.data.text_views import TextViews
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import DataError

ROWS_PER_TASK = 32
_NUM_FETCHERS = 16
"""Blocks that are fetched at the same time."""
_MAX_REPLACEMENTS = 64
_BLOCKS_PER_SHARD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a stream of batches is made of."""

    views: Views
    augment: AugmentConfig
    side_px: int
    """S, side of the image views."""
    context_length: int
    """Longest text in tokens."""
    batch_size: int
    """B, pairs per batch on each rank."""
    seed: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    """Loader threads, in this process or in others; 0 loads in line."""
    loader: Literal["threads", "processes"] = "threads"
    order: Literal["exact", "blocks"] = "exact"
    num_streams: int = 1
    """C, into which blocks are divided."""
    open_blocks: int = 128
    """Blocks between which samples are shuffled."""
    mask_special_ids: bool = False
    """Let random ids of masked texts be special ones too, as the original does."""
    num_captions: int = 1
    """C, captions of a pair among its texts."""
    compare_captions: bool = False
    """Tell which captions are the same."""
    max_bad: float = 0.05
    """Largest share of samples that may be unreadable before the stream stops."""
    pin_memory: bool = False
    """Put the pixels into page-locked memory, from which a GPU copies without waiting."""
    cache_mib: int = 512
    """Decoded images are kept in memory when those of the whole data set fit into this."""

    @property
    def global_size(self) -> int:
        """G, pairs per batch on all ranks together."""
        return self.batch_size * self.world_size


class BatchBuffer(NamedTuple):
    """Where the rows of a batch are written."""

    images: NDArray[np.uint8]
    """(B, V, S, S, 3)."""
    tokens: NDArray[np.int64]
    """(B, T, L), L the context length."""
    mlm_labels: NDArray[np.int64]
    """(B, L)."""
    indices: NDArray[np.int64]
    """(B,)."""
    caption_ids: NDArray[np.int64]
    """(B, C), C = 0 if captions are not compared."""
    boxes: NDArray[np.float32]
    """(B, V, 4), or (B, 0, 4) if nobody asks where the views lie."""


class Task(NamedTuple):
    """Consecutive rows of a batch that are wanted."""

    first: int
    """Row of the batch."""
    epoch: int
    positions: list[int]
    """Of the rows in the epoch's order."""
    indices: list[int]
    """Of the samples there."""


class Filled(NamedTuple):
    """What came of a task, its rows apart."""

    length: int
    """Tokens of the longest text."""
    bad: list[BadSample]
    """Samples that could not be used."""
    process: int
    """Who filled them."""
    num_truncated: int
    """Texts that this process has cut so far."""
    is_exhausted: bool = False
    """Too many samples in a row could not be used; the rows are not filled."""


def make_order(samples: Dataset, config: StreamConfig) -> Order:
    """Choose the order that a configuration asks for; the exact one where a data set has no blocks."""
    if config.order == "exact" or not isinstance(samples, BlockDataset):
        return ExactOrder(len(samples), config.seed)
    firsts = samples.block_firsts
    if firsts is None:
        open_shards = max(2, config.open_blocks // _BLOCKS_PER_SHARD)
        return ShardOrder(samples.num_blocks, config.seed, open_shards=open_shards, count=samples.count)
    return BlockOrder(firsts, config.seed, num_streams=config.num_streams, open_blocks=config.open_blocks)


class Filler:
    """Draw the views of pairs into buffers; (seed, epoch, index) decides everything. Threads may share it.

    A pair that cannot be used is counted, and a replacement takes its row.

    Args:
        samples: the pairs.
        order: finds replacements.
        config: how.
        num_shares: processes that share the memory for decoded images.
    """

    def __init__(self, samples: Dataset, order: Order, config: StreamConfig, *, num_shares: int = 1) -> None:
        cv2.setNumThreads(0)  # the threads are here; OpenCV's own would only compete with them
        self._order, self._config = order, config
        self._tokenizer = Tokenizer(config.context_length)
        self._pairs = PairViews(
            samples,
            config.views,
            image_views=ImageViews(config.augment, config.side_px),
            text_views=TextViews(config.augment, self._tokenizer, mask_special_ids=config.mask_special_ids),
            num_captions=config.num_captions,
            seed=config.seed,
            cache_bytes=(config.cache_mib << 20) // num_shares,
        )

    def __call__(self, buffer: BatchBuffer, task: Task) -> Filled:
        """Fill some rows."""
        longest, bad = 0, list[BadSample]()
        for row, position, index in zip(count(task.first), task.positions, task.indices, strict=False):
            for attempt in range(1, _MAX_REPLACEMENTS + 1):
                try:
                    others = buffer.tokens[row], buffer.mlm_labels[row], buffer.caption_ids[row], buffer.boxes[row]
                    longest = max(longest, self._pairs.draw(index, task.epoch, buffer.images[row], *others))
                    buffer.indices[row] = index
                    break
                except UnreadablePair as error:
                    bad.append(error.sample)
                    index = self._order.replacement(task.epoch, position, attempt, self._config.global_size)
            else:
                return Filled(0, bad, os.getpid(), self._tokenizer.num_truncated, is_exhausted=True)
        return Filled(longest, bad, os.getpid(), self._tokenizer.num_truncated)


def buffer_type(name: str) -> np.dtype[Any]:
    """Return the number format of one of a buffer's arrays."""
    return np.dtype({"images": np.uint8, "boxes": np.float32}.get(name, np.int64))


def buffer_shapes(config: StreamConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a buffer's arrays by name."""
    size, length = config.batch_size, config.context_length
    num_boxes = len(config.views.images) if "whole" in config.views.images else 0
    return {
        "images": (size, len(config.views.images), config.side_px, config.side_px, 3),
        "tokens": (size, len(config.views.texts), length),
        "mlm_labels": (size, length),
        "indices": (size,),
        "caption_ids": (size, config.num_captions if config.compare_captions else 0),
        "boxes": (size, num_boxes, 4),
    }


class Fetcher:
    """Prefetch blocks of a data set, and release them, in threads of its own."""

    def __init__(self, samples: Dataset) -> None:
        self._samples = samples
        self._pool = ThreadPoolExecutor(_NUM_FETCHERS, "declip-fetcher")  # starts threads when asked to fetch

    def fetch(self, blocks: Sequence[int]) -> None:
        """Start to prefetch blocks; what cannot be fetched fails when it is read."""
        for block in blocks:
            self._pool.submit(self._fetch, block)

    def _fetch(self, block: int) -> None:
        if isinstance(self._samples, BlockDataset):
            with suppress(DataError):
                self._samples.fetch(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Release blocks that are used up."""
        if isinstance(self._samples, BlockDataset):
            for block in blocks:
                self._pool.submit(self._samples.release, block)

    def close(self) -> None:
        """End the threads when their current work is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Ticket(NamedTuple):
    """A batch that is being filled."""

    buffer: BatchBuffer
    results: list[Future[Filled]]


class _InLine(Executor):
    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:  # noqa: ANN401
        """Work at once, in the thread that asks."""
        done: Future[Any] = Future()
        done.set_result(work(*args, **options))
        return done


class ThreadLoader:
    """Load in threads of this process, or in line.

    Args:
        samples: the pairs.
        order: theirs.
        config: how.
    """

    def __init__(self, samples: Dataset, order: Order, config: StreamConfig) -> None:
        self._config = config
        self._fill = Filler(samples, order, config)
        self._pool = ThreadPoolExecutor(config.workers, "declip-loader") if config.workers else _InLine()
        self._fetcher = Fetcher(samples)
        self.fetch, self.release = self._fetcher.fetch, self._fetcher.release

    def begin(self, tasks: Sequence[Task]) -> Ticket:
        """Start to fill the rows of a batch."""
        shapes = buffer_shapes(self._config)
        others = (np.empty(shapes[name], buffer_type(name)) for name in BatchBuffer._fields[1:])
        buffer = BatchBuffer(_empty(shapes["images"], pin_memory=self._config.pin_memory), *others)
        return Ticket(buffer, [self._pool.submit(self._fill, buffer, task) for task in tasks])

    def finish(self, ticket: Ticket) -> tuple[BatchBuffer, list[Filled]]:
        """Wait for a batch."""
        return ticket.buffer, [result.result() for result in ticket.results]

    def drop(self, ticket: Ticket) -> None:
        """Give a batch up."""
        for result in ticket.results:
            result.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._fetcher.close()


def _empty(shape: tuple[int, ...], *, pin_memory: bool) -> NDArray[np.uint8]:
    if pin_memory:
        import torch  # loader processes start three times as fast without

        pinned: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
    # NumPy asks for huge pages where torch does not: a tenth of the loader's time went into page faults.
    return np.empty(shape, dtype=np.uint8)
