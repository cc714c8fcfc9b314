"""Start several processes, or join those that a launcher started."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException

from declip_cli.config import TrainConfig
from declip_cli.errors import DeclipError, TrainError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE_S = 3.0
"""How long the other ranks may take to end by themselves when one has failed."""

T = TypeVar("T")


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

    Ctrl-C and SIGTERM are passed on to the ranks, which end as they see fit; the third Ctrl-C ends them at once.

    Args:
        work: called as `work(*arguments)` in each process; importable by name.
        arguments: can be pickled.
        num_processes: ranks.

    Returns:
        What rank 0 returned.

    Raises:
        DeclipError: what the first failing rank raised; the other ranks are stopped.
        KeyboardInterrupt: the ranks were stopped before rank 0 had a result.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with _signals_passed_on() as (ranks, asked):
        ranks.append(
            torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
                _run_rank,
                (work, arguments, num_processes, port, messages),
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
            _raise_own_error(messages, failure, was_asked=bool(asked), num_processes=num_processes)
    if messages.empty():
        raise KeyboardInterrupt
    result: T = messages.get()
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

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ranks, asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks[0].processes if ranks else []:
            process.kill()  # does nothing to one that has ended


def _raise_own_error(messages: Any, failure: Exception, *, was_asked: bool, num_processes: int) -> None:  # noqa: ANN401
    while not messages.empty():
        message = messages.get()
        if isinstance(message, _Failure):
            words = f"{message.message} (process {message.rank} of {num_processes})"
            raise message.kind(words, remedy=message.remedy) from None
    if was_asked:
        raise KeyboardInterrupt from failure
    if isinstance(failure, ProcessExitedException):
        raise TrainError(
            str(failure), remedy="if memory ran out: --micro-batch-size, or a smaller --batch-size; then --resume"
        ) from failure
    raise failure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A DeclipError on its way from a rank."""

    rank: int
    kind: type[DeclipError]
    message: str
    remedy: str


def _run_rank(
    rank: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    num_processes: int,
    port: int,
    messages: Any,  # noqa: ANN401
) -> None:
    values = (rank, num_processes, rank, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(_RANK_VARIABLES, values, strict=True)})
    os.environ["LOCAL_WORLD_SIZE"] = str(num_processes)
    try:
        result = work(*arguments)
        if rank == 0:
            messages.put(result)
    except DeclipError as error:
        messages.put(_Failure(rank=rank, kind=type(error), message=error.message, remedy=error.remedy))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
