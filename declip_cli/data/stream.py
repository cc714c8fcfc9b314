"""Shuffled, rank-split, exactly resumable batches without end."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from declip_cli.batch import Batch
from declip_cli.data.dataset import UNREAD, Dataset, Skips
from declip_cli.data.loader import ROWS_PER_TASK, StreamConfig, Task, ThreadLoader, make_order
from declip_cli.data.loader_processes import ProcessLoader
from declip_cli.data.order import Order, ShardOrder, Window, WindowedOrder
from declip_cli.data.pair_views import BadSample
from declip_cli.errors import DataError

_MIN_ROWS_TO_JUDGE = 1000

Loader: TypeAlias = ThreadLoader | ProcessLoader


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch in the making."""

    epoch: int
    end: int
    """Position after its last row, on any rank, in the epoch's order."""
    ticket: Any
    """Of the loader."""
    used_up: list[int]
    """Blocks that no later batch reads, nor this one."""


class TrainStream(Iterator[Batch]):
    """Yield batches of augmented pairs, epoch after epoch.

    Global batch k holds positions k·G to (k+1)·G - 1 of an epoch's order, G = batch_size · world_size, those of one
    stream of the order beside each other; each rank takes its contiguous part of the rows. So the global batches do
    not depend on how many ranks share them, ranks read different streams where the numbers divide each other, and
    no number of shards, workers or samples has to. The last, incomplete global batch of an epoch is dropped.

    The exact order reads samples here and there, which suits a local SSD; the one in blocks reads each block of the
    shards in one piece, ahead of its use.

    (seed, epoch, number) decides every augmentation, so threads, processes and ranks change nothing.

    A pair that cannot be read is counted and skipped. As all ranks must contribute equally many pairs, its
    row goes to the pair at the same row of the next global batch (of the one after next, if that is unreadable
    too, and so on; after the last comes the first): a function of the epoch's order alone, so that ranks
    agree without exchanging messages, no other row shifts, and `Batch.indices` tells which pair was used.

    Args:
        samples: the pairs.
        config: the rest.

    Raises:
        DataError: the data set is smaller than one global batch.
    """

    def __init__(self, samples: Dataset, config: StreamConfig) -> None:
        self._samples, self._config = samples, config
        if len(samples) < config.global_size:
            raise self._too_few()
        self._order = make_order(samples, config)
        tasks_per_batch = -(-config.batch_size // ROWS_PER_TASK)
        self._num_ahead = max(2, -(-2 * config.workers // tasks_per_batch)) if config.workers else 0
        self._loader: Loader
        if config.loader == "processes" and config.workers:
            self._loader = ProcessLoader(samples, config, num_buffers=self._num_ahead + 1)
        else:
            self._loader = ThreadLoader(samples, self._order, config)
        self._ahead = ReadAhead.of(self._order, self._loader)
        self._pending: deque[_Pending] = deque()
        self._consumed = self._scheduled = (0, 0)  # epoch, position in its order
        self._bad: dict[int, BadSample] = {}
        self._num_truncated: dict[int, int] = {}
        """Loader process → texts it has cut so far."""
        self.wait_seconds = 0.0
        """Time the consumer has waited for batches so far."""

    @property
    def num_samples(self) -> int:
        """Pairs in the data set; an estimate while its shards are not counted."""
        return len(self._samples)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the data set."""
        return len(self._samples) // self._config.global_size

    @property
    def num_truncated_captions(self) -> int:
        """Texts cut to the context length so far, counted in every view, those in prefetched batches included."""
        return sum(self._num_truncated.values())

    @property
    def skipped(self) -> Skips:
        """Unreadable samples met by this rank so far."""
        skipped = Skips()
        for bad in self._bad.values():
            skipped.add(bad.cause, bad.key)
        return skipped

    def state(self) -> dict[str, Any]:
        """Describe how far the consumer has come, for `restore`; prefetched batches do not count.

        Returns:
            Plain values, fit for JSON; the position is the same on all ranks. Pairs that a disk or a network failed
            to give are not among the bad ones: they are asked for again.
        """
        state = {
            "epoch": self._consumed[0],
            "position": self._consumed[1],
            "seed": self._config.seed,
            "fingerprint": self._samples.fingerprint,
            "order": self._order.identity,
            "bad": [list(bad) for bad in self._bad.values() if bad.cause != UNREAD],
        }
        if isinstance(self._order, ShardOrder):
            state["counts"] = self._order.counts.tolist()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is the one that would have come then.

        The number of ranks and workers may differ, and even the batch size: every pair that was left of the
        epoch still comes.

        Args:
            state: from `state()`.

        Raises:
            DataError: the state belongs to other data, another seed or another order.
        """
        found = {"seed": self._config.seed, "fingerprint": self._samples.fingerprint, "order": self._order.identity}
        for key, value in found.items():
            before = state.get(key, {"kind": "exact"})  # runs of old had but one order
            if before != value:
                if key == "fingerprint" and "order" not in state:
                    raise DataError(
                        "the run was started with other data, or by a version that identifies data differently",
                        remedy="finish it with that version, or start a new run from its weights: --init RUN",
                    )
                raise DataError(
                    f"the run was started with another data {key} (found {value}, expected {before})",
                    remedy="resume with the --data, --seed, data.order, data.streams and data.open_blocks it had",
                )
        self._drop_pending()
        if isinstance(self._order, ShardOrder):
            self._order.counts[:] = state["counts"]
        self._consumed = self._scheduled = (int(state["epoch"]), int(state["position"]))
        self._bad = {bad[0]: BadSample(*bad) for bad in state["bad"] if bad[2] != UNREAD}

    def close(self) -> None:
        """Stop threads and processes; the stream cannot be used afterwards."""
        self._pending.clear()
        self._loader.close()

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._next()
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _next(self) -> Batch:
        while len(self._pending) <= self._num_ahead:
            self._pending.append(self._schedule())
        pending = self._pending.popleft()
        buffer, filled = self._loader.finish(pending.ticket)
        self._loader.release(pending.used_up)
        self._consumed = (pending.epoch, pending.end)
        for rows in filled:
            self._num_truncated[rows.process] = max(self._num_truncated.get(rows.process, 0), rows.num_truncated)
        bad = [sample for rows in filled for sample in rows.bad]
        for rows in filled:
            if rows.is_exhausted:
                raise self._too_many_bad(f"{len(rows.bad)} samples in a row", rows.bad)
        self._count_bad(bad)
        whole = self._config.views.pad_to_context
        length = self._config.context_length if whole else max(rows.length for rows in filled)
        return Batch(
            images=torch.from_numpy(buffer.images),
            tokens=torch.from_numpy(buffer.tokens[..., :length].copy()),
            mlm_labels=torch.from_numpy(buffer.mlm_labels[:, :length].copy()),
            pair_indices=torch.from_numpy(buffer.indices.copy()),
            caption_ids=torch.from_numpy(buffer.caption_ids.copy()),
            boxes=torch.from_numpy(buffer.boxes.copy()),
        ).counted()

    def _schedule(self) -> _Pending:
        config, global_size = self._config, self._config.global_size
        epoch, start = self._scheduled
        if not self._order.reaches(epoch, start + global_size):
            epoch, start = epoch + 1, 0
            if not self._order.reaches(epoch, global_size):
                raise self._too_few()
        self._scheduled = (epoch, start + global_size)
        positions = np.arange(start, start + global_size)
        # Stream after stream, so that a rank's rows belong to few of them.
        positions = positions[np.argsort(positions % self._order.num_streams, kind="stable")]
        positions = positions[config.rank * config.batch_size :][: config.batch_size]
        used_up = self._ahead.move_to(epoch, positions) if self._ahead else []
        indices = self._order.indices(epoch, positions)
        parts = [slice(row, row + ROWS_PER_TASK) for row in range(0, config.batch_size, ROWS_PER_TASK)]
        tasks = [Task(part.start, epoch, positions[part].tolist(), indices[part].tolist()) for part in parts]
        return _Pending(epoch, start + global_size, self._loader.begin(tasks), used_up)

    def _too_few(self) -> DataError:
        num, config = len(self._samples), self._config
        largest = num // config.world_size
        return DataError(
            f"the data set has {num} pairs, fewer than one batch of {config.global_size} "
            f"({config.batch_size} on each of {config.world_size} processes)",
            remedy=f"--batch-size {largest}" if largest >= 2 else "prepare more pairs",
        )

    def _count_bad(self, found: Sequence[BadSample]) -> None:
        for bad in found:
            self._bad.setdefault(bad.sample_index, bad)
        if not found:
            return
        num, (epoch, position) = len(self._samples), self._consumed
        num_read = min(num, (epoch * num + position) // self._config.world_size)
        if len(self._bad) > self._config.max_bad * max(num_read, min(num, _MIN_ROWS_TO_JUDGE)):
            raise self._too_many_bad(f"{len(self._bad)} of {num_read} samples read so far", found)

    def _too_many_bad(self, how_many: str, found: Sequence[BadSample]) -> DataError:
        for bad in found:
            self._bad.setdefault(bad.sample_index, bad)
        remedy = "repair the data set with declip prepare, or allow more with --set data.max_bad=…"
        if all(bad.cause == UNREAD for bad in found):
            remedy = "check the disk or the network, then resume the run"
        return DataError(
            f"{how_many} cannot be used, more than data.max_bad = {self._config.max_bad:g} allows ({self.skipped})",
            remedy=remedy,
        )

    def _drop_pending(self) -> None:
        for pending in self._pending:
            self._loader.drop(pending.ticket)
        self._pending.clear()
        self._ahead = ReadAhead.of(self._order, self._loader)


class ReadAhead:
    """Fetch the blocks of each stream's next window while the present one is read, and release those that are done."""

    def __init__(self, order: WindowedOrder, loader: Loader) -> None:
        self._order, self._loader = order, loader
        self._open: dict[int, deque[Window]] = {}
        """Stream → its windows that are fetched and not released, first the oldest."""

    @staticmethod
    def of(order: Order, loader: Loader) -> "ReadAhead | None":
        """Make one where an order has windows; else there is nothing to fetch."""
        return ReadAhead(order, loader) if isinstance(order, WindowedOrder) else None

    def move_to(self, epoch: int, positions: NDArray[np.int64]) -> list[int]:
        """Fetch what some positions, and those after them, need; return the blocks that those before them needed."""
        used_up: list[int] = []
        for window in self._order.windows(epoch, positions):
            opened = self._open.setdefault(window.stream, deque())
            if not opened or opened[-1] < window:
                self._fetch(opened, window)
            if opened[-1] == window:
                self._fetch(opened, self._order.after(window))
        for opened in self._open.values():
            while len(opened) > 2:
                used_up += self._order.pieces(opened.popleft())
        return used_up

    def _fetch(self, opened: deque[Window], window: Window) -> None:
        opened.append(window)
        self._loader.fetch(self._order.pieces(window))
