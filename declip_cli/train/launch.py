"""Start one process per rank on this machine."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from declip_cli.config import TrainConfig
from declip_cli.errors import TrainError
from declip_cli.process_group import signals_handled

_GRACE_S = 15.0
"""How long the other ranks may take to end by themselves when one has failed."""

T = TypeVar("T")


class RankFailed(Exception):
    """A rank has ended with an error, which it has reported itself, and an exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def wanted_processes(train: TrainConfig) -> int:
    """Choose how many processes to start: as asked, else one per GPU where GPUs are used, else one.

    Raises:
        TrainError: srun has started several tasks, each of which would train alone.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise TrainError(
            f"srun has started {tasks} tasks without ranks; each would train alone",
            remedy="srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc-per-node=gpu --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_NODE:29500 -m declip_cli pretrain …",
        )
    if train.processes is not None:
        return train.processes
    return max(1, torch.cuda.device_count()) if train.device in ("auto", "cuda") else 1


def start_processes(work: Callable[..., T], arguments: tuple[Any, ...], *, num_processes: int) -> T:
    """Run a function on several ranks of this machine and wait for all.

    Ctrl-C and SIGTERM are passed on to the ranks, which end as they see fit, however long they take to save; the third
    Ctrl-C ends them at once. torch's `elastic_launch` cannot do this: after a signal it raises instead of returning
    rank 0's result, it passes Ctrl-C on to ranks that the terminal has sent it to, and before torch 2.14 it kills
    them after 30 s.

    Args:
        work: importable by name; it tells its own errors.
        arguments: of `work`; can be pickled.
        num_processes: ranks.

    Returns:
        What rank 0 returned.

    Raises:
        RankFailed: a rank has ended with an error.
        KeyboardInterrupt: the ranks were stopped before rank 0 had a result.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with _signals_passed_on() as (processes, asked):
        ranks = torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _run_rank, (work, arguments, num_processes, port, results), nprocs=num_processes, join=False
        )
        processes.extend(ranks.processes)
        if asked:  # before they could be signaled
            raise KeyboardInterrupt
        try:
            while not ranks.join(grace_period=_GRACE_S):
                pass
        except (ProcessRaisedException, ProcessExitedException) as failure:
            if asked:
                raise KeyboardInterrupt from failure
            code = failure.exit_code if isinstance(failure, ProcessExitedException) else 1
            raise RankFailed(str(failure), exit_code=max(1, code)) from failure
    if results.empty():
        raise KeyboardInterrupt
    result: T = results.get()
    return result


@contextmanager
def _signals_passed_on() -> Iterator[tuple[list[BaseProcess], list[int]]]:
    """Tell processes when this one is asked to stop; end them when it goes before they do.

    Yields:
        The processes, to be filled; the signals so far.
    """
    processes: list[BaseProcess] = []
    asked: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        if asked.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt
        for process in processes:
            process.terminate()

    try:
        with signals_handled(pass_on):
            yield processes, asked
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended


def _run_rank(
    rank: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    num_processes: int,
    port: int,
    results: Any,  # noqa: ANN401
) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ.update({name: str(signum) for name, signum in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    result = work(*arguments)
    if rank == 0:
        results.put(result)
