"""Run a stage on many records at once, results in the order of the records."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_RECORDS_PER_TASK = 16
_TASKS_AHEAD = 4


def num_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_threads(
    work: Callable[[Sequence[T]], list[R]], items: Iterable[T], *, workers: int = 0
) -> Generator[R, None, None]:
    """Apply a function to items in threads, a few batches ahead of the reader.

    Args:
        work: from a batch of items to one result each; releases the interpreter lock where it is slow.
        items: any number.
        workers: threads; 0 takes the cores there are.

    Yields:
        One result per item, in order.
    """
    workers = workers or num_cores()
    waiting: deque[Future[list[R]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
        try:
            for batch in in_batches(items):
                waiting.append(pool.submit(work, batch))
                if len(waiting) >= workers * _TASKS_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Cut a stream of items into tasks of a few."""
    iterator = iter(items)
    while batch := list(islice(iterator, _RECORDS_PER_TASK)):
        yield batch
