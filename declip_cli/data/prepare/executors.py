"""Process many records at once, with the results in the order of the records."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from declip_cli.cores import own_cores
from declip_cli.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
_RECORDS_PER_TASK = 16
_TASKS_AHEAD = 4


def run_in_threads(
    work: Callable[[Sequence[T]], list[R]], items: Iterable[T], *, workers: int = 0
) -> Generator[R, None, None]:
    """Apply a function to items in threads, a few batches ahead of the reader.

    Args:
        work: from a batch of items to one result each; releases the interpreter lock where it is slow.
        items: any number.
        workers: threads; 0 uses all available cores.

    Yields:
        One result per item, in order.
    """
    workers = workers or len(own_cores())
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
    try:
        yield from _in_order(lambda batch: pool.submit(work, batch), Future.result, items, workers)
    finally:
        pool.shutdown(cancel_futures=True)


def run_on_ray(
    work: Callable[[Sequence[T]], list[R]], items: Iterable[T], *, workers: int = 0
) -> Generator[R, None, None]:
    """Apply a function to items on a Ray cluster: the one that `RAY_ADDRESS` names, or one of this machine's cores.

    Every node needs declip and the same files; the results are written by the process that calls. The rest is as of
    `run_in_threads`, where `work` and the items can be pickled and 0 workers are the cluster's cores.

    Raises:
        DataError: Ray is not installed.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise DataError("--engine ray needs the package ray", remedy="pip install 'declip[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": workers or len(own_cores()), "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    try:
        workers = workers or int(ray.cluster_resources().get("CPU", 1))
        yield from _in_order(partial(ray.remote(_call).remote, ray.put(work)), ray.get, items, workers)
    finally:
        if is_ours:
            ray.shutdown()


def _call(work: Callable[[Sequence[T]], list[R]], batch: Sequence[T]) -> list[R]:
    return work(batch)


def _in_order(
    submit: Callable[[list[T]], Any], result: Callable[[Any], list[R]], items: Iterable[T], workers: int
) -> Iterator[R]:
    """Submit batches of items as tasks, a few for each worker ahead of the results."""
    waiting: deque[Any] = deque()
    iterator = iter(items)
    while batch := list(islice(iterator, _RECORDS_PER_TASK)):
        waiting.append(submit(batch))
        if len(waiting) >= workers * _TASKS_AHEAD:
            yield from result(waiting.popleft())
    while waiting:
        yield from result(waiting.popleft())
