"""Start several processes, or join those that a launcher started."""

import os
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from declip_cli.errors import DeclipError, TrainError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join_slurm() -> None:
    """Translate SLURM's variables into those of torch's launchers, if srun started several tasks.

    Raises:
        TrainError: the first node's name is not to be had.
    """
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", "1"))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
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


def is_launched() -> bool:
    """Tell whether a launcher (accelerate launch, torchrun, srun) has already given this process its rank."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_main_process() -> bool:
    """Tell whether this is the process that writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def wanted_processes(requested: int) -> int:
    """Settle how many processes to start: as asked, else one per GPU, else one."""
    return requested or max(1, torch.cuda.device_count())


def start_processes(work: Callable[..., None], arguments: tuple[Any, ...], *, num_processes: int) -> None:
    """Run a function on several ranks of this machine and wait for all.

    Args:
        work: called as `work(*arguments)` in each process; importable by name.
        arguments: can be pickled.
        num_processes: ranks.

    Raises:
        DeclipError: what the first failing rank raised; the other ranks are stopped.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    try:
        torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
            _run_rank,
            (work, arguments, num_processes, port, failures),
            nprocs=num_processes,
            start_method="spawn",
        )
    except Exception:
        if failures.empty():
            raise
        rank, kind, message, remedy = failures.get()
        raise kind(f"{message} (process {rank} of {num_processes})", remedy=remedy) from None


def _run_rank(
    rank: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    num_processes: int,
    port: int,
    failures: Any,  # noqa: ANN401
) -> None:
    values = (rank, num_processes, rank, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(_RANK_VARIABLES, values, strict=True)})
    os.environ["LOCAL_WORLD_SIZE"] = str(num_processes)
    try:
        work(*arguments)
    except DeclipError as error:
        failures.put((rank, type(error), error.message, error.remedy))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
