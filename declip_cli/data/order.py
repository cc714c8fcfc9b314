"""Which sample stands at each position of each epoch: exactly shuffled, or in blocks that are read in one piece."""

import functools
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from declip_cli.data.dataset import ROW_BITS
from declip_cli.data.seeding import scattered, shuffled

Integers: TypeAlias = NDArray[np.int64]

_ALL_PIECES = 0


class Window(NamedTuple):
    """Samples of one stream that are shuffled with each other; later windows of a stream compare greater."""

    stream: int
    epoch: int
    number: int


class Order(ABC):
    """Which sample stands at each position of each epoch; the same on every rank."""

    num_streams = 1
    """C. Position p belongs to stream p mod C, so that equal shares of each batch come from each stream."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again, fit for JSON."""

    @abstractmethod
    def indices(self, epoch: int, positions: Integers) -> Integers:
        """Return the sample numbers at some positions of an epoch, int64, (n,)."""

    @abstractmethod
    def reaches(self, epoch: int, end: int) -> bool:
        """Return whether an epoch has so many samples."""

    def replacement(self, epoch: int, position: int, attempt: int, stride: int) -> int:
        """Choose the sample that takes the row of one that cannot be used: that row of a later batch.

        Args:
            epoch: from 0.
            position: of the unusable sample.
            attempt: from 1; the how-manieth sample is asked for.
            stride: positions in a global batch.

        Returns:
            Its number; a function of the order alone, so that ranks agree.
        """
        first, size = self._range_around(epoch, position)
        # One row further after each lap: a range of few batches must not offer the same pair again.
        laps = attempt // max(1, size // stride)
        offset = first + (position - first + attempt * stride + laps) % size
        return int(self.indices(epoch, np.array([offset]))[0])

    @abstractmethod
    def _range_around(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the first position, and the number of positions, among which replacements are sought."""


class ExactOrder(Order):
    """An exact shuffle of the whole data set.

    Args:
        num: samples in the data set, at least 1.
        seed: of the run.
    """

    def __init__(self, num: int, seed: int) -> None:
        self._num, self._seed = num, seed

    @property
    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        return {"kind": "exact"}

    def indices(self, epoch: int, positions: Integers) -> Integers:
        """See `Order`."""
        return shuffled(self._num, self._seed, epoch, positions=positions)

    def reaches(self, epoch: int, end: int) -> bool:
        """See `Order`."""
        return end <= self._num

    def _range_around(self, epoch: int, position: int) -> tuple[int, int]:
        return 0, self._num


@dataclass(slots=True)
class _Plan:
    """One epoch: all pieces laid out in a row, stream after stream, each cut into windows.

    Where pieces are counted when their turn comes, `starts` and `bounds` grow.
    """

    pieces: Integers
    """Blocks or shards in their order."""
    starts: Integers
    """Where each of them begins in the row, and where the last ends."""
    spans: Integers
    """The first piece of each window, and the one behind its last, (W, 2)."""
    bounds: Integers
    """Where windows begin in the row, and where the last ends."""
    streams: Integers
    """Where streams begin in the row, and where the last ends, (C + 1,)."""
    stream_windows: Integers
    """The first window of each stream, and the number of windows, (C + 1,)."""


class WindowedOrder(Order):
    """Pieces are permuted over the epoch; samples are shuffled exactly inside windows of several pieces.

    Args:
        piece_firsts: the number of the first sample of each piece.
        seed: of the run.
        num_streams: C.
        width: pieces in a window.
    """

    def __init__(self, piece_firsts: Integers, seed: int, *, num_streams: int, width: int) -> None:
        self._piece_firsts, self._seed, self.num_streams, self._width = piece_firsts, seed, num_streams, width
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.RLock()
        self._shuffle = functools.lru_cache(2 * num_streams)(scattered)  # asked for again until a window is used up

    @abstractmethod
    def _make_plan(self, epoch: int) -> _Plan: ...

    def _reach(self, plan: _Plan, end: int) -> None:
        """Make sure that the plan knows where so many samples of an epoch lie, if it has them."""

    def reaches(self, epoch: int, end: int) -> bool:
        """See `Order`."""
        return bool(end <= self._plan(epoch, end).bounds[-1])

    def indices(self, epoch: int, positions: Integers) -> Integers:
        """See `Order`."""
        plan = self._plan(epoch, int(positions.max()) + 1)
        offsets = self._offsets(plan, positions)
        windows = np.searchsorted(plan.bounds, offsets, "right") - 1
        rows = np.argsort(windows, kind="stable")
        cuts = [0, *(np.flatnonzero(np.diff(windows[rows])) + 1).tolist(), len(rows)]
        for begin, end in pairwise(cuts):
            here, window = rows[begin:end], windows[rows[begin]]
            first, last = plan.bounds[window : window + 2].tolist()
            offsets[here] = first + self._shuffle(last - first, self._seed, epoch, first + 1)[offsets[here] - first]
        piece = np.searchsorted(plan.starts, offsets, "right") - 1
        return self._piece_firsts[plan.pieces[piece]] + offsets - plan.starts[piece]

    def pieces(self, window: Window) -> list[int]:
        """List the blocks (of uncounted sets, shards) that a window reads."""
        plan = self._plan(window.epoch)
        found: list[int] = plan.pieces[slice(*plan.spans[window.number])].tolist()
        return found

    def windows(self, epoch: int, positions: Integers) -> list[Window]:
        """List the windows that some positions lie in."""
        plan = self._plan(epoch, int(positions.max()) + 1)
        found = np.unique(np.searchsorted(plan.bounds, self._offsets(plan, positions), "right") - 1)
        streams = np.searchsorted(plan.stream_windows, found, "right") - 1
        return [Window(stream, epoch, index) for stream, index in zip(streams.tolist(), found.tolist(), strict=True)]

    def after(self, window: Window) -> Window:
        """Return the window of the same stream that follows, in the next epoch if need be."""
        stream, epoch, index = window
        if index + 1 < self._plan(epoch).stream_windows[stream + 1]:
            return Window(stream, epoch, index + 1)
        return Window(stream, epoch + 1, int(self._plan(epoch + 1).stream_windows[stream]))

    def _offsets(self, plan: _Plan, positions: Integers) -> Integers:
        return plan.streams[positions % self.num_streams] + positions // self.num_streams

    def _plan(self, epoch: int, end: int = 0) -> _Plan:
        with self._lock:
            if epoch not in self._plans:
                self._plans = {kept: plan for kept, plan in self._plans.items() if abs(kept - epoch) <= 1}
                self._plans[epoch] = self._make_plan(epoch)
            self._reach(self._plans[epoch], end)
            return self._plans[epoch]


class BlockOrder(WindowedOrder):
    """A shuffle that reads every block of the shards in one piece and once.

    Blocks are permuted over the epoch and cut into C streams of equal length. Each stream is cut into windows of
    consecutive blocks, and the samples of a window are shuffled exactly: every sample once an epoch, from at least
    `open_blocks` blocks at any time. Windows of different streams, and of different epochs, begin at different times.

    Args:
        block_firsts: the numbers of the samples at which blocks begin, and their sum, int64, (blocks + 1,).
        seed: of the run.
        num_streams: C.
        open_blocks: blocks between which samples are shuffled, over all streams together; if there are no more blocks
            than these, the shuffle is exact.
    """

    def __init__(self, block_firsts: Integers, seed: int, *, num_streams: int, open_blocks: int) -> None:
        is_exact = open_blocks >= len(block_firsts) - 1
        num_streams = 1 if is_exact else num_streams
        width = len(block_firsts) if is_exact else -(-open_blocks // num_streams)
        super().__init__(block_firsts, seed, num_streams=num_streams, width=width)
        self._num = int(block_firsts[-1])

    @property
    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        blocks = zlib.crc32(np.ascontiguousarray(self._piece_firsts).data)
        return {"kind": "blocks", "streams": self.num_streams, "width": self._width, "blocks": blocks}

    def _range_around(self, epoch: int, position: int) -> tuple[int, int]:
        return 0, self._num

    def _make_plan(self, epoch: int) -> _Plan:
        num, width, num_streams = len(self._piece_firsts) - 1, self._width, self.num_streams
        blocks = scattered(num, self._seed, epoch, _ALL_PIECES)
        starts = np.append(0, np.cumsum(np.diff(self._piece_firsts)[blocks]))
        lengths = (self._num - np.arange(num_streams) + num_streams - 1) // num_streams  # positions that are s mod C
        streams = np.append(0, np.cumsum(lengths))
        spans, bounds = [], []
        for stream in range(num_streams):
            first = int(np.searchsorted(starts, streams[stream], "right")) - 1
            last = max(first, int(np.searchsorted(starts, streams[stream + 1], "left")))
            phase = (int(blocks[0]) + width * stream // num_streams) % width  # any number that changes with the epoch
            edges = first + _edges(last - first, width, width + phase)
            spans.append(np.stack([edges[:-1], edges[1:]], axis=1))
            bounds += [streams[stream], *starts[edges[1:-1]]]
        counts = np.cumsum([0, *map(len, spans)])
        return _Plan(blocks, starts, np.concatenate(spans), np.array([*bounds, self._num]), streams, counts)


class ShardOrder(WindowedOrder):
    """A shuffle of shards that are counted only when their turn comes.

    Whole shards are permuted over the epoch, and the samples of several consecutive ones are shuffled exactly. In the
    first epoch the first windows are smaller (1, 2, 4 … shards), so that training starts when one shard has come.

    Args:
        num_shards: of the data set.
        seed: of the run.
        open_shards: shards between which samples are shuffled.
        count: counts the samples of a shard; the same on every rank.
    """

    def __init__(self, num_shards: int, seed: int, *, open_shards: int, count: Callable[[int], int]) -> None:
        super().__init__(np.arange(num_shards) << ROW_BITS, seed, num_streams=1, width=open_shards)
        self._count = count
        self.counts: Integers = np.full(num_shards, -1, dtype=np.int64)
        """Samples of each shard, -1 where they are not counted yet; part of a stream's state."""

    @property
    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        return {"kind": "shards", "width": self._width}

    def _range_around(self, epoch: int, position: int) -> tuple[int, int]:
        bounds = self._plan(epoch, position + 1).bounds
        index = int(np.searchsorted(bounds, position, "right")) - 1
        return int(bounds[index]), int(bounds[index + 1] - bounds[index])

    def _make_plan(self, epoch: int) -> _Plan:
        num = len(self.counts)
        shards = scattered(num, self._seed, epoch, _ALL_PIECES)
        edges = _edges(num, self._width, self._width)
        if epoch == 0:
            ramp = 2 ** np.arange(self._width.bit_length()) - 1
            edges = np.concatenate([ramp[2 * ramp < edges[1]], edges[1:]])
        spans = np.stack([edges[:-1], edges[1:]], axis=1)
        nothing = np.zeros(1, np.int64)
        return _Plan(shards, nothing, spans, nothing, np.zeros(2, np.int64), np.array([0, len(spans)]))

    def _reach(self, plan: _Plan, end: int) -> None:
        while plan.bounds[-1] < end and len(plan.bounds) <= len(plan.spans):
            shards = plan.pieces[slice(*plan.spans[len(plan.bounds) - 1])]
            for shard in shards.tolist():
                if self.counts[shard] < 0:
                    self.counts[shard] = self._count(shard)
            ends = plan.starts[-1] + np.cumsum(self.counts[shards])
            plan.starts = np.append(plan.starts, ends)
            plan.bounds = np.append(plan.bounds, ends[-1])


def _edges(num: int, width: int, first: int) -> Integers:
    """Cut a row of pieces into windows, the first of `first`, the others of `width`, the last of what is left."""
    return np.concatenate([[0], np.arange(first, num - width + 1, width), [num]])
