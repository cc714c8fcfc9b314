"""Rows of a batch, filled by processes of their own, so that the thread that trains keeps its interpreter."""

import concurrent.futures
import functools
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import DupFd
from typing import Any, Literal, NamedTuple

import numpy as np

from declip_cli.data.dataset import Dataset
from declip_cli.data.loader import (
    BatchBuffer,
    Fetcher,
    Filled,
    Filler,
    StreamConfig,
    Task,
    buffer_shapes,
    buffer_type,
    make_order,
)
from declip_cli.errors import DataError

_CLOSE_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class BufferTicket(NamedTuple):
    """A batch that is being filled."""

    buffer: int
    results: list[Future[Filled]]


class ProcessLoader:
    """Load in worker processes, into memory that they share with this one.

    Workers end with this process, however it ends, and leave its signals to it.

    Args:
        samples: the pairs, which are pickled.
        config: how.
        num_buffers: batches that are filled at the same time.
    """

    def __init__(self, samples: Dataset, config: StreamConfig, *, num_buffers: int) -> None:
        num_buffers += 2 if config.pin_memory else 0  # one that the consumer has, one that is still copied from
        file = _SharedFile(num_buffers * _layout(config)[0])
        memory = file.map()
        self._buffers = _buffers(memory, config)
        self._free = deque(range(num_buffers))
        self._pin = config.pin_memory
        self._held: deque[tuple[int, Any]] = deque()
        self._context = _RecordingContext()
        setup = (file, pickle.dumps(samples), config)
        self._pool = ProcessPoolExecutor(config.workers, self._context, _set_up, setup)
        resource_tracker.ensure_running()  # which would otherwise start below, and unblock the signals
        # A worker must not be ended by signals to the group, not even before it can ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for _ in range(config.workers):
                self._pool.submit(os.getpid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._pin:
            _pin(memory)

    def begin(self, tasks: Sequence[Task]) -> BufferTicket:
        """As `ThreadLoader`'s."""
        if not self._free:
            buffer, copied = self._held.popleft()
            copied.synchronize()
            self._free.append(buffer)
        buffer = self._free.popleft()
        return BufferTicket(buffer, [self._submit(_fill, buffer, task) for task in tasks])

    def finish(self, ticket: BufferTicket) -> tuple[BatchBuffer, list[Filled]]:
        """Wait for a batch; page-locked images are overwritten some batches later, when they are copied."""
        if self._pin and self._held and self._held[-1][1] is None:  # the consumer has put its copy into the GPU's queue
            import torch

            copied = torch.cuda.Event()
            copied.record()
            self._held[-1] = (self._held[-1][0], copied)
        try:
            filled = [result.result() for result in ticket.results]
        except BrokenProcessPool as error:
            raise self._death() from error
        buffer = self._buffers[ticket.buffer]
        if self._pin:
            self._held.append((ticket.buffer, None))
            return buffer, filled
        self._free.append(ticket.buffer)
        copies = {name: getattr(buffer, name).copy() for name in BatchBuffer._fields}
        return BatchBuffer(**copies), filled

    def drop(self, ticket: BufferTicket) -> None:
        """As `ThreadLoader`'s."""
        concurrent.futures.wait([result for result in ticket.results if not result.cancel()])
        self._free.append(ticket.buffer)

    def fetch(self, blocks: Sequence[int]) -> None:
        """As `ThreadLoader`'s."""
        self._submit(_move, "fetch", blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """As `ThreadLoader`'s."""
        if blocks:
            self._submit(_move, "release", blocks)

    def close(self) -> None:
        """End the processes, if need be while they work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._context.started:
            process.join(_CLOSE_S)
            process.kill()
            process.join()

    def _submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:  # noqa: ANN401
        try:
            return self._pool.submit(work, *args)
        except BrokenProcessPool as error:
            raise self._death() from error

    def _death(self) -> DataError:
        ended = wait([process.sentinel for process in self._context.started])
        dead = next(process for process in self._context.started if process.sentinel in ended)
        for process in self._context.started:  # they ignore the pool's signal to end
            process.kill()
        self._pool.shutdown()  # a thread of the pool collects the exit codes
        return DataError(
            f"the loader process {dead.name} (pid {dead.pid}) has ended with exit code {dead.exitcode}",
            remedy="if memory ran out (-9), fewer with --set data.workers=…; --set data.loader=threads starts none",
        )


class _RecordingContext(SpawnContext):
    """Start processes with names of ours, and know them."""

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: ANN401, N802
        """Make one."""
        process = SpawnProcess(*args, **options)
        process.name = f"declip-loader-{len(self.started)}"
        self.started.append(process)
        return process


class _SharedFile:
    """Memory without a name, which no limit of /dev/shm touches and which nobody has to remove."""

    def __init__(self, num_bytes: int, number: int = -1) -> None:
        self._num_bytes, self._number = num_bytes, number
        if number < 0:
            if hasattr(os, "memfd_create"):
                self._number = os.memfd_create("declip-loader")
            else:
                with tempfile.TemporaryFile() as temporary:
                    self._number = os.dup(temporary.fileno())
            os.truncate(self._number, num_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self._num_bytes, DupFd(self._number))

    def __del__(self) -> None:
        os.close(self._number)

    def map(self) -> mmap.mmap:
        """Map all of it."""
        return mmap.mmap(self._number, self._num_bytes)


def _received(num_bytes: int, number: Any) -> _SharedFile:  # noqa: ANN401
    return _SharedFile(num_bytes, number.detach())


class _Worker(NamedTuple):
    """What a worker process works with."""

    buffers: list[BatchBuffer]
    fill: Filler
    fetcher: Fetcher


_setup: list[Any] = []
"""In a worker process: the shared memory, the pickled pairs and the configuration."""


def _set_up(file: _SharedFile, samples: bytes, config: StreamConfig) -> None:
    """Prepare a worker process; what opening the pairs may raise is left to its first task, which can tell it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _setup[:] = file, samples, config


@functools.cache
def _worker() -> _Worker:
    file, pickled, config = _setup
    samples = pickle.loads(pickled)
    fill = Filler(samples, make_order(samples, config), config, num_shares=config.workers)
    return _Worker(_buffers(file.map(), config), fill, Fetcher(samples))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _fill(buffer: int, task: Task) -> Filled:
    worker = _worker()
    return worker.fill(worker.buffers[buffer], task)


def _move(how: Literal["fetch", "release"], blocks: Sequence[int]) -> None:
    getattr(_worker().fetcher, how)(blocks)


def _layout(config: StreamConfig) -> tuple[int, list[tuple[str, tuple[int, ...], int]]]:
    """Return the size of a buffer in bytes, whole pages, and its arrays' types, shapes and offsets."""
    offset, arrays = 0, []
    for name, shape in buffer_shapes(config).items():
        kind = buffer_type(name)
        arrays.append((kind.name, shape, offset))
        offset += -(-int(np.prod(shape)) * kind.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    return offset, arrays


def _buffers(memory: mmap.mmap, config: StreamConfig) -> list[BatchBuffer]:
    num_bytes, arrays = _layout(config)
    return [
        BatchBuffer(*(np.ndarray(shape, kind, memory, start + offset) for kind, shape, offset in arrays))
        for start in range(0, len(memory), num_bytes)
    ]


def _pin(memory: mmap.mmap) -> None:
    """Lock the pages for the GPU, which otherwise copies more slowly, but copies."""
    import torch

    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)  # type: ignore[no-untyped-call]
