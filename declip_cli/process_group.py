"""Processes that train together: they join, agree, and end together as soon as one of them fails."""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from declip_cli.distributed import TIMEOUT, rank, world_size
from declip_cli.errors import DeclipError, TrainError

_POLL_S = 1.0
_SILENCE_S = 45.0
"""A rank that gives no sign of life for so long counts as killed."""
_GOODBYE_S = 5.0
"""How long a failing rank stays so that the others can read why; the store may live in its process."""
_FAREWELL_S = 0.5
"""How long rank 0 stays after that, so that they can read that all have read it."""
_REMEDY = "look at its output and its machine; if memory ran out: --micro-batch-size; then --resume"
_FAILED, _READ, _ALIVE = "declip/failed", "declip/read", "declip/alive/"

T = TypeVar("T")


def is_launched() -> bool:
    """Return whether a launcher (accelerate launch, torchrun) has already given this process its rank."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def joined(*, has_gpu: bool, log: Callable[[str], None]) -> Iterator[None]:
    """Join the processes that a launcher started; an error inside the block ends all of them.

    Every rank gives a sign of life and looks for a failure once a second, beside the work, through the key-value
    store under the process group: a rank that waits in a collective for one that failed ends within seconds.

    Args:
        has_gpu: tensors on a GPU are exchanged too; those on the CPU always are.
        log: prints a message; called on rank 0 when another rank has failed.

    Raises:
        TrainError: the processes do not find each other, or one of them is gone.
        DeclipError: whatever this rank raised.
    """
    if not is_launched():
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise TrainError(
            f"the {os.environ['WORLD_SIZE']} processes cannot reach each other: {error}",
            remedy="check MASTER_ADDR and MASTER_PORT, and that every process has started",
        ) from error
    watch = _Watch(log)
    try:
        yield
        dist.barrier()
    except BaseException as error:
        is_told = watch.fail(error)
        if is_told and rank() != 0 and isinstance(error, DeclipError):
            os._exit(error.exit_code)  # rank 0 has said it; once is enough
        if isinstance(error, RuntimeError) and not isinstance(error, DeclipError) and _is_broken_connection(error):
            raise TrainError(
                "another process has disappeared: it was killed, or its machine is down",
                remedy=_REMEDY,
            ) from error
        raise
    watch.stop()
    dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """Call a function on rank 0 and give its result, fit for pickling, to every rank."""
    if world_size() == 1:
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    result: T = box[0]
    return result


def from_all(value: T) -> list[T]:
    """Collect a value, fit for pickling, of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def signals_handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a function handle Ctrl-C and a scheduler's SIGTERM and SIGUSR1 inside the block; in the main thread."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {signum: signal.signal(signum, handle) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Watch:
    """A thread that looks after the other ranks."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        # A connection of its own: the main thread may wait in the other one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=_SILENCE_S))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="declip-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave after all ranks have come to the end; rank 0 last, since the store may live in its process."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._store.add(_READ, 1)
            self._wait_for(world_size() if rank() == 0 else 0)

    def fail(self, error: BaseException) -> bool:
        """Tell the other ranks why this one ends; return whether all of them have read it."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):
            if self._store.check([_FAILED]):  # this error only follows from that one
                self._end(self._store.get(_FAILED))
            message = "".join(traceback.format_exception_only(error)).strip()
            if isinstance(error, DeclipError):
                self._store.set(_FAILED, _failure(rank(), error.message, remedy=error.remedy))
            else:
                self._store.set(_FAILED, _failure(rank(), message))
            return self._wait_for(world_size() - 1)
        return False

    def _wait_for(self, num_ranks: int) -> bool:
        """Wait until so many ranks have read that it is over; not forever, since some may have ended."""
        began = time.monotonic()
        while (num_read := self._store.add(_READ, 0)) < num_ranks and time.monotonic() - began < _GOODBYE_S:
            time.sleep(0.05)
        return num_read >= num_ranks

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        others = [r for r in range(world_size()) if r != rank()] if rank() == 0 else [0]
        count = 0
        try:
            while not self._over.wait(_POLL_S):
                count += 1
                self._store.set(f"{_ALIVE}{rank()}", str(count))
                if self._store.check([_FAILED]):
                    self._end(self._store.get(_FAILED))
                self._check_ranks(others, seen)
        except RuntimeError:
            if not self._over.is_set():
                self._end(_failure(0, "it disappeared without an error: it was killed, or its machine is down"))

    def _check_ranks(self, others: list[int], seen: dict[int, tuple[bytes, float]]) -> None:
        """End everything when one of the ranks has been silent for too long."""
        now = time.monotonic()
        for other in others:
            key = f"{_ALIVE}{other}"
            sign = self._store.get(key) if self._store.check([key]) else b""
            if seen.setdefault(other, (sign, now))[0] != sign:
                seen[other] = (sign, now)
            elif now - seen[other][1] > _SILENCE_S:
                silence = f"no sign of life for {_SILENCE_S:.0f} s: it was killed, or its machine is down"
                self._store.set(_FAILED, _failure(other, silence, remedy=_REMEDY))

    def _end(self, failure: str | bytes) -> None:
        """End this process, whatever its main thread waits for."""
        content = json.loads(failure)
        if rank() == 0:
            self._log(f"error: process {content['rank']} of {world_size()} has failed: {content['message']}")
            if content["remedy"]:
                self._log(f"  fix: {content['remedy']}")
        with suppress(RuntimeError):
            self._store.add(_READ, 1)
            if rank() == 0:
                self._wait_for(world_size() - 1)
                time.sleep(_FAREWELL_S)
        os._exit(1)


def _failure(of_rank: int, message: str, *, remedy: str = "") -> str:
    return json.dumps({"rank": of_rank, "message": message, "remedy": remedy})


def _is_broken_connection(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "socket", "peer")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
