"""Rows of a batch, filled by processes of their own, so that the thread that trains keeps its interpreter."""

import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, TypeVar

import numpy as np

from declip_cli.data.dataset import Dataset
from declip_cli.data.loader import (
    NUM_FETCHERS,
    Filled,
    Filler,
    Room,
    StreamConfig,
    Task,
    fetch_piece,
    make_order,
    release_piece,
    room_shapes,
)
from declip_cli.errors import DataError, DeclipError

THREADS_PER_PROCESS = 3
"""A pair takes a fifth of its time under the interpreter's lock."""
_CLOSE_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

T = TypeVar("T")


class _Failure(NamedTuple):
    """What has gone wrong in a worker process."""

    message: str
    remedy: str
    cause: str
    trace: str = ""
    """Not empty if the program itself is at fault."""


@dataclass(slots=True)
class _Ticket:
    """A batch that is being filled."""

    room: int
    unfinished: set[int]
    """Numbers of its tasks."""
    results: dict[int, Filled]


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: "Connection[Any, Any]"
    num_tasks: int = 0
    num_cut: int = 0


class ProcessLoader:
    """Load in worker processes of a few threads each, into memory that they share with this one.

    Workers end with this process, however it ends, and leave its signals to it.

    Args:
        reopen: opens the pairs in another process; can be pickled.
        config: how.
        num_rooms: batches that are filled at the same time.
    """

    def __init__(self, reopen: Callable[[], Dataset], config: StreamConfig, *, num_rooms: int) -> None:
        num_rooms += 2 if config.pin_memory else 0  # one that the consumer has, one that is still copied from
        num_bytes, _ = _layout(config)
        file = _anonymous_file(num_rooms * num_bytes)
        memory = mmap.mmap(file, num_rooms * num_bytes)
        self._pin = config.pin_memory
        self._rooms = _rooms(memory, config, num_rooms)
        self._free = deque(range(num_rooms))
        self._held: deque[tuple[int, Any]] = deque()
        self._tickets: dict[int, _Ticket] = {}
        self._num_begun = 0
        num_processes = -(-config.workers // THREADS_PER_PROCESS)
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # which would otherwise start below, and unblock the signals
        self._workers = []
        for number in range(num_processes):
            ours, theirs = context.Pipe()
            share = len(range(number, config.workers, num_processes))
            arguments = (theirs, DupFd(file), num_rooms, reopen, config, share, num_processes)
            process = context.Process(target=_work, args=arguments, name=f"declip-loader-{number}", daemon=True)
            # A worker must not be ended by signals to the group, not even before it can ignore them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._workers.append(_Worker(process, ours))
        os.close(file)
        # Before the interpreter waits for its children, which wait for the pipes to be closed.
        self.close = Finalize(self, _end, args=(self._workers,), exitpriority=100)
        if self._pin:
            _pin(memory)

    def begin(self, tasks: Sequence[Task]) -> _Ticket:
        """As `ThreadLoader`'s."""
        if not self._free:
            room, copied = self._held.popleft()
            copied.synchronize()
            self._free.append(room)
        ticket = _Ticket(self._free.popleft(), set(), {})
        for task in tasks:
            self._num_begun += 1
            ticket.unfinished.add(self._num_begun)
            self._tickets[self._num_begun] = ticket
            worker = min(self._workers, key=lambda each: each.num_tasks)
            worker.num_tasks += 1
            self._send(worker, ("fill", self._num_begun, ticket.room, task))
        return ticket

    def finish(self, ticket: _Ticket) -> tuple[Room, list[Filled]]:
        """Wait for a batch; page-locked images are overwritten some batches later, when they are copied."""
        if self._pin and self._held and self._held[-1][1] is None:  # the consumer has put its copy into the GPU's queue
            import torch

            copied = torch.cuda.Event()
            copied.record()
            self._held[-1] = (self._held[-1][0], copied)
        while ticket.unfinished:
            self._receive()
        room = self._rooms[ticket.room]
        if self._pin:
            self._held.append((ticket.room, None))
        else:
            room = Room(room.images.copy(), room.tokens.copy(), room.mask_labels.copy(), room.numbers.copy())
            self._free.append(ticket.room)
        return room, [ticket.results[number] for number in sorted(ticket.results)]

    def drop(self, ticket: _Ticket) -> None:
        """As `ThreadLoader`'s."""
        while ticket.unfinished:
            self._receive()
        self._free.append(ticket.room)

    def fetch(self, pieces: Sequence[int]) -> None:
        """As `ThreadLoader`'s."""
        for piece in pieces:
            self._send(self._workers[piece % len(self._workers)], ("fetch", piece))

    def release(self, pieces: Sequence[int]) -> None:
        """As `ThreadLoader`'s."""
        for piece in pieces:
            self._send(self._workers[piece % len(self._workers)], ("release", piece))

    def _send(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        try:
            worker.pipe.send(message)
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self) -> None:
        """Take what workers have done, at least one task of one."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                number, result = worker.pipe.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if isinstance(result, _Failure):
                if result.trace:
                    raise RuntimeError(f"in the loader process {worker.process.name}:\n{result.trace}")
                raise DataError(result.message, remedy=result.remedy, cause=result.cause)
            ticket = self._tickets.pop(number)
            worker.num_tasks -= 1
            ticket.unfinished.remove(number)
            worker.num_cut = result.num_cut
            ticket.results[number] = result._replace(num_cut=sum(each.num_cut for each in self._workers))

    def _death(self, worker: _Worker) -> DataError:
        worker.process.join(_CLOSE_S)
        process = worker.process
        return DataError(
            f"the loader process {process.name} (pid {process.pid}) has ended with exit code {process.exitcode}",
            remedy="if memory ran out (-9), fewer with --set data.workers=…; --set data.loader=threads starts none",
        )


def _work(
    pipe: "Connection[Any, Any]",
    file: Any,  # noqa: ANN401  (a DupFd)
    num_rooms: int,
    reopen: Callable[[], Dataset],
    config: StreamConfig,
    num_threads: int,
    num_processes: int,
) -> None:
    """Fill rooms until the other end of the pipe is closed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    answer = _Answers(pipe)
    try:
        num_bytes, _ = _layout(config)
        rooms = _rooms(mmap.mmap(file.detach(), num_rooms * num_bytes), config, num_rooms)
        opened: list[Dataset] = []
        fill = answer(0, partial(_prepare, reopen, config, num_processes, opened))
        pool, fetchers = ThreadPoolExecutor(num_threads), ThreadPoolExecutor(NUM_FETCHERS)
        while fill is not None:
            kind, *words = pipe.recv()
            if kind == "fill":
                number, room, task = words
                pool.submit(answer, number, partial(fill, rooms[room], task))
            else:
                fetchers.submit(fetch_piece if kind == "fetch" else release_piece, opened[0], *words)
    except (EOFError, OSError):
        os._exit(0)  # whoever wanted the rows is gone: threads need not finish


def _prepare(reopen: Callable[[], Dataset], config: StreamConfig, num_processes: int, opened: list[Dataset]) -> Filler:
    opened.append(reopen())
    return Filler(opened[0], make_order(opened[0], config), config, num_shares=num_processes)


class _Answers:
    """Send what becomes of tasks; from several threads."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def __call__(self, number: int, work: Callable[[], T]) -> T | None:
        """Work, and tell the result of a task, and any failure; number 0 is no task."""
        result: T | None = None
        answer: T | _Failure
        try:
            answer = result = work()
        except DeclipError as error:
            answer = _Failure(error.message, error.remedy, getattr(error, "cause", ""))
        except Exception:
            answer = _Failure("", "", "", traceback.format_exc())
        if number or isinstance(answer, _Failure):
            with self._lock:
                self._pipe.send((number, answer))
        return result


def _layout(config: StreamConfig) -> tuple[int, list[tuple[str, tuple[int, ...], int]]]:
    """Return the bytes of a room, whole pages, and its arrays' types, shapes and places."""
    place, arrays = 0, []
    for name, shape in room_shapes(config).items():
        kind = np.dtype(np.uint8 if name == "images" else np.int64)
        arrays.append((kind.name, shape, place))
        place += -(-int(np.prod(shape)) * kind.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    return place, arrays


def _rooms(memory: mmap.mmap, config: StreamConfig, num_rooms: int) -> list[Room]:
    num_bytes, arrays = _layout(config)
    return [
        Room(*(np.ndarray(shape, kind, memory, room * num_bytes + place) for kind, shape, place in arrays))
        for room in range(num_rooms)
    ]


def _anonymous_file(num_bytes: int) -> int:
    """Make shared memory without a name, which no limit of /dev/shm touches and which nobody has to remove."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("declip-loader")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, num_bytes)
    return file


def _pin(memory: mmap.mmap) -> None:
    """Lock the pages for the GPU, which otherwise copies more slowly, but copies."""
    import torch

    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)  # type: ignore[no-untyped-call]


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.process.join(_CLOSE_S)
        worker.process.kill()
        worker.process.join()
