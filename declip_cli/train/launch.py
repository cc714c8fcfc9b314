"""Start several processes, or join those that a launcher started."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException

from declip_cli.config import TrainConfig
from declip_cli.errors import TrainError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE_S = 15.0
"""How long the other ranks may take to end by themselves when one has failed."""

T = TypeVar("T")


class RankFailed(Exception):
    """A rank has ended with an error, which it has told itself.

    Args:
        message: what torch says of it.
        exit_code: of that rank.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def join_slurm() -> None:
    """Translate SLURM's variables into those of torch's launchers, if srun started several tasks.

    A job script itself also sees `SLURM_NTASKS` and rank 0, but not the variables of a step: there nobody would
    start the other ranks.

    Raises:
        TrainError: the first node's name cannot be found.
    """
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    tasks_on_first_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # such as 4(x2),3
    environment.setdefault("LOCAL_WORLD_SIZE", tasks_on_first_node.group() if tasks_on_first_node else "1")
    # Steps of one job may run side by side.
    number = 101 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(20000 + number % 20000))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment["SLURM_JOB_NODELIST"])


def _first_host(node_list: str) -> str:
    try:
        command = ["scontrol", "show", "hostnames", node_list]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return names[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise TrainError(
            f"cannot find the first node of {node_list}: {error}", remedy="export MASTER_ADDR=<name of the first node>"
        ) from error


def wanted_processes(train: TrainConfig) -> int:
    """Settle how many processes to start: as asked, else one per GPU where GPUs are used, else one."""
    if train.processes is not None:
        return train.processes
    return max(1, torch.cuda.device_count()) if train.device in ("auto", "cuda") else 1


def start_processes(work: Callable[..., T], arguments: tuple[Any, ...], *, num_processes: int) -> T:
    """Run a function on several ranks of this machine and wait for all.

    Ctrl-C and SIGTERM are passed on to the ranks, which end as they see fit, however long they take to save; the third
    Ctrl-C ends them at once. (torch's elastic launcher would kill them after 30 s.)

    Args:
        work: called as `work(*arguments)` in each process; importable by name; it tells its own errors.
        arguments: can be pickled.
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
    with _signals_passed_on() as (ranks, asked):
        ranks.append(
            torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
                _run_rank,
                (work, arguments, num_processes, port, results),
                nprocs=num_processes,
                join=False,
                start_method="spawn",
            )
        )
        if asked:
            raise KeyboardInterrupt
        try:
            while not ranks[0].join(grace_period=_GRACE_S):
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
def _signals_passed_on() -> Iterator[tuple[list[ProcessContext], list[int]]]:
    """Tell the ranks when this process is asked to stop, and end them when it goes before they do.

    Yields:
        The started ranks, to be filled; the signals received so far.
    """
    ranks: list[ProcessContext] = []
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if asked.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt
        for process in ranks[0].processes if ranks else []:
            process.terminate()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield ranks, asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks[0].processes if ranks else []:
            process.kill()  # does nothing to one that has ended


def _run_rank(
    rank: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    num_processes: int,
    port: int,
    results: Any,  # noqa: ANN401
) -> None:
    values = (rank, num_processes, rank, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(_RANK_VARIABLES, values, strict=True)})
    os.environ["LOCAL_WORLD_SIZE"] = str(num_processes)
    result = work(*arguments)
    if rank == 0:
        results.put(result)
