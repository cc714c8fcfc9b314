"""Shuffled, rank-split, exactly resumable batches without end."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_cli.batch import Batch
from declip_cli.config import AugmentConfig, Views
from declip_cli.data.draws import shuffled
from declip_cli.data.image_views import ImageViews
from declip_cli.data.pair_views import BadSample, PairTexts, PairViews, UnreadablePair, collate_texts, join_texts
from declip_cli.data.samples import UNREAD, SampleStore
from declip_cli.data.text_views import TextViews
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import DataError

_ROWS_PER_TASK = 32
_MAX_STAND_INS = 64
_MIN_ROWS_TO_JUDGE = 1000


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
    """Loader threads; 0 loads in line."""
    mask_special_ids: bool = False
    """Let random ids of masked texts be special ones too, as the original does."""
    max_bad: float = 0.05
    """Largest share of samples that may be unreadable before the stream stops."""
    pin_memory: bool = False
    """Put the pixels into page-locked memory, from which a GPU copies without waiting."""
    cache_mib: int = 512
    """Decoded pictures are kept in memory when those of the whole data set fit into this."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Consecutive rows of a batch, ready."""

    tokens: NDArray[np.int64]
    """Padded to the longest of these rows, (rows, T, L)."""
    mask_labels: NDArray[np.int64]
    numbers: list[int]
    bad: list[BadSample]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch in the making."""

    epoch: int
    position: int
    """Of this rank's first row in the epoch's order."""
    numbers: NDArray[np.int64]
    images: Tensor
    tasks: list["Future[_Rows]"]


class TrainStream(Iterator[Batch]):
    """Yield batches of augmented pairs, epoch after epoch.

    The order of an epoch is an exact shuffle of the whole data set. Global batch k holds positions k·G to
    (k+1)·G - 1 of it, G = batch_size · world_size; each rank takes its contiguous part. So the global batches
    do not depend on how many ranks share them, and no number of shards, workers or samples has to divide
    another. The last, incomplete global batch of an epoch is dropped. Samples are read by their place in the
    shards, here and there, which suits a local SSD; remote shards should be cached there.

    (seed, epoch, number) decides every augmentation, so threads and ranks change nothing.

    A pair that cannot be read is counted and skipped. As all ranks must contribute equally many pairs, its
    row goes to the pair at the same row of the next global batch (of the one after next, if that is unreadable
    too, and so on; after the last comes the first): a function of the epoch's order alone, so that ranks
    agree without a word, no other row shifts, and `Batch.numbers` tells which pair was used.

    Args:
        samples: the pairs.
        config: the rest.

    Raises:
        DataError: the data set is smaller than one global batch.
    """

    def __init__(self, samples: SampleStore, config: StreamConfig) -> None:
        global_size = config.batch_size * config.world_size
        if len(samples) < global_size:
            largest = len(samples) // config.world_size
            raise DataError(
                f"the data set has {len(samples)} pairs, fewer than one batch of {global_size} "
                f"({config.batch_size} on each of {config.world_size} processes)",
                remedy=f"--batch-size {largest}" if largest >= 2 else "prepare more pairs",
            )
        cv2.setNumThreads(0)  # the threads are here; OpenCV's own would only compete with them
        self._samples = samples
        self._config = config
        self._global_size = global_size
        self._tokenizer = Tokenizer(config.context_length)
        self._pairs = PairViews(
            samples,
            config.views,
            image_views=ImageViews(config.augment, config.side_px),
            text_views=TextViews(config.augment, self._tokenizer, mask_special_ids=config.mask_special_ids),
            seed=config.seed,
            cache_bytes=config.cache_mib << 20,
        )
        self._pool = ThreadPoolExecutor(config.workers, "declip-loader") if config.workers else None
        tasks_per_batch = -(-config.batch_size // _ROWS_PER_TASK)
        self._num_ahead = max(2, -(-2 * config.workers // tasks_per_batch))
        self._pending: deque[_Pending] = deque()
        self._consumed = self._scheduled = (0, 0)  # epoch, position in its order
        self._bad: dict[int, BadSample] = {}
        self.wait_seconds = 0.0
        """Time the consumer has waited for batches so far."""

    @property
    def num_samples(self) -> int:
        """Pairs in the data set."""
        return len(self._samples)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the data set."""
        return len(self._samples) // self._global_size

    @property
    def num_cut_captions(self) -> int:
        """Texts cut to the context length so far, counted in every view, those in prefetched batches included."""
        return self._tokenizer.num_truncated

    @property
    def skipped(self) -> dict[str, tuple[int, str]]:
        """Unreadable samples met by this rank so far: cause → (number of samples, first key)."""
        skipped: dict[str, tuple[int, str]] = {}
        for bad in self._bad.values():
            count, first_key = skipped.get(bad.cause, (0, bad.key))
            skipped[bad.cause] = (count + 1, first_key)
        return skipped

    def state(self) -> dict[str, Any]:
        """Describe how far the consumer has come, for `restore`; prefetched batches do not count.

        Returns:
            Plain values, fit for JSON; the position is the same on all ranks. Pairs that a disk or a network failed
            to give are not among the bad ones: they are asked for again.
        """
        return {
            "epoch": self._consumed[0],
            "position": self._consumed[1],
            "seed": self._config.seed,
            "fingerprint": self._samples.fingerprint,
            "bad": [list(bad) for bad in self._bad.values() if bad.cause != UNREAD],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is the one that would have come then.

        The number of ranks and workers may differ, and even the batch size: every pair that was left of the
        epoch still comes.

        Args:
            state: from `state()`.

        Raises:
            DataError: the state belongs to other data or another seed.
        """
        found = {"seed": self._config.seed, "fingerprint": self._samples.fingerprint}
        for key, value in found.items():
            if state[key] != value:
                raise DataError(
                    f"the run was begun with another data {key} (found {value}, expected {state[key]})",
                    remedy="resume with the same --data and --seed, or start a new run",
                )
        self._drop_pending()
        self._consumed = self._scheduled = (int(state["epoch"]), int(state["position"]))
        self._bad = {bad[0]: BadSample(*bad) for bad in state["bad"] if bad[2] != UNREAD}

    def close(self) -> None:
        """Stop the loader threads; the stream cannot be used afterwards."""
        self._drop_pending()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._next()
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _next(self) -> Batch:
        while len(self._pending) <= (self._num_ahead if self._pool else 0):
            self._pending.append(self._schedule())
        pending = self._pending.popleft()
        every_row = range(self._config.batch_size)
        done = [task.result() for task in pending.tasks] or [self._fill(pending, every_row)]
        self._consumed = (pending.epoch, self._global_start(pending) + self._global_size)
        self._count_bad([bad for rows in done for bad in rows.bad])
        tokens, mask_labels = join_texts([(rows.tokens, rows.mask_labels) for rows in done])
        return Batch(
            images=pending.images,
            tokens=torch.from_numpy(tokens),
            mask_labels=torch.from_numpy(mask_labels),
            numbers=torch.tensor([number for rows in done for number in rows.numbers]),
        )

    def _schedule(self) -> _Pending:
        epoch, start = self._scheduled
        if start + self._global_size > len(self._samples):
            epoch, start = epoch + 1, 0
        self._scheduled = (epoch, start + self._global_size)
        size, side_px = self._config.batch_size, self._config.side_px
        position = start + self._config.rank * size
        shape = (size, len(self._config.views.images), side_px, side_px, 3)  # (B, V, S, S, 3)
        pending = _Pending(
            epoch,
            position,
            self._order(epoch, np.arange(position, position + size)),
            _room(shape, self._config.pin_memory),
            [],
        )
        if self._pool is not None:
            for first in range(0, size, _ROWS_PER_TASK):
                rows = range(first, min(first + _ROWS_PER_TASK, size))
                pending.tasks.append(self._pool.submit(self._fill, pending, rows))
        return pending

    def _global_start(self, pending: _Pending) -> int:
        return pending.position - self._config.rank * self._config.batch_size

    def _order(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return shuffled(len(self._samples), self._config.seed, epoch, positions=positions)

    def _fill(self, pending: _Pending, rows: Sequence[int]) -> _Rows:
        images = pending.images.numpy()
        texts: list[PairTexts] = []
        numbers: list[int] = []
        found_bad: list[BadSample] = []
        for row in rows:
            number = int(pending.numbers[row])
            for attempt in range(1, _MAX_STAND_INS + 1):
                try:
                    texts.append(self._pairs.draw(number, pending.epoch, images[row]))
                    numbers.append(number)
                    break
                except UnreadablePair as error:
                    found_bad.append(error.sample)
                    if attempt == _MAX_STAND_INS:
                        raise self._too_many_bad(f"{attempt} samples in a row", found_bad) from error
                    number = self._stand_in(pending.epoch, pending.position + row, attempt)
        views = self._config.views
        length = self._config.context_length if views.pad_to_context else 0
        tokens, mask_labels = collate_texts(texts, num_views=len(views.texts), length=length)
        return _Rows(tokens, mask_labels, numbers, found_bad)

    def _stand_in(self, epoch: int, position: int, attempt: int) -> int:
        """Choose the pair that takes the row of an unreadable one; a function of the epoch's order alone."""
        num = len(self._samples)
        # One row further after each lap: a data set of few batches shall not offer the same pair again.
        laps = attempt // self.steps_per_epoch
        return int(self._order(epoch, np.array([(position + attempt * self._global_size + laps) % num]))[0])

    def _count_bad(self, found: Sequence[BadSample]) -> None:
        for bad in found:
            self._bad.setdefault(bad.number, bad)
        if not found:
            return
        num, (epoch, position) = len(self._samples), self._consumed
        num_read = min(num, (epoch * num + position) // self._config.world_size)
        if len(self._bad) > self._config.max_bad * max(num_read, min(num, _MIN_ROWS_TO_JUDGE)):
            raise self._too_many_bad(f"{len(self._bad)} of {num_read} samples read so far", found)

    def _too_many_bad(self, how_many: str, found: Sequence[BadSample]) -> DataError:
        for bad in found:
            self._bad.setdefault(bad.number, bad)
        causes = ", ".join(f"{cause}: {n}, first {key}" for cause, (n, key) in self.skipped.items())
        remedy = "mend the data set with declip prepare, or allow more with --set data.max_bad=…"
        if all(bad.cause == UNREAD for bad in found):
            remedy = "check the disk or the network, then resume the run"
        return DataError(
            f"{how_many} cannot be used, more than data.max_bad = {self._config.max_bad:g} allows ({causes})",
            remedy=remedy,
        )

    def _drop_pending(self) -> None:
        for pending in self._pending:
            for task in pending.tasks:
                task.cancel()
        self._pending.clear()


def _room(shape: tuple[int, ...], pin_memory: bool) -> Tensor:
    if pin_memory:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    # NumPy asks for huge pages where torch does not: a tenth of the loader's time went into page faults.
    return torch.from_numpy(np.empty(shape, dtype=np.uint8))
