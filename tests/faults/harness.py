"""Runs that can be killed at any moment: forked from a process that has imported all, so that many can be tried."""

import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch._dynamo  # noqa: F401  (an optimizer imports it; here once, before anything is forked)

from declip_cli.train.run_dir import RunDir
from tests.damage import damaged
from tests.train.small_runs import run, small_config

METHODS = ("clip", "slip", "filip", "declip", "defilip")
WAYS = {
    "plain": ({}, 1),
    "micro-batches, average": ({"train": {"micro_batch_size": 4, "ema_decay": 0.9}}, 1),
    "two processes": ({"train": {"batch_size": 4}}, 2),
}
PATIENCE_S = 60.0
"""How long the ranks that are left may take to end."""


@dataclass
class Case:
    """A method trained in one of several ways."""

    method: str
    way: str
    steps: int = 8
    sections: dict = field(default_factory=dict)

    @property
    def world_size(self):
        return WAYS[self.way][1]

    def config(self):
        train = {
            "steps": self.steps,
            "batch_size": 8,
            "checkpoint_every_steps": 2,
            **WAYS[self.way][0].get("train", {}),
        }
        return small_config(method={"name": self.method, "queue_size": 40}, train=train)


def start(case, path, *, is_resumed):
    """Start every rank of a run in a process of its own; return their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ids = []
    for rank in range(case.world_size):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(case, path, rank, port, is_resumed=is_resumed)
        ids.append(pid)
    return ids


def _be_a_rank(case, path, rank, port, *, is_resumed):
    code = 1
    try:
        log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        if case.world_size > 1:
            values = {"RANK": rank, "WORLD_SIZE": case.world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(case.world_size)})
            os.environ.update({name: str(value) for name, value in values.items()})
        run(case.config(), path, is_resumed=is_resumed)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(ids, *, timeout_s=PATIENCE_S):
    """Wait for all of these processes; return their exit codes, or raise if one does not end."""
    codes, began = {}, time.monotonic()
    while len(codes) < len(ids):
        for pid in ids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() - began > timeout_s:
            for pid in set(ids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"{len(ids) - len(codes)} of {len(ids)} processes did not end within {timeout_s:.0f} s")
        time.sleep(0.005)
    return [codes[pid] for pid in ids]


def begin_or_go_on(case, path):
    """Start a run, or go on with one that has begun: what a cluster does after a node has failed."""
    return start(case, path, is_resumed=(path / "config.json").exists())


def undisturbed(case, path):
    """Run to the end without a fault; return how long it took."""
    began = time.monotonic()
    assert wait(start(case, path, is_resumed=False)) == [0] * case.world_size, Path(f"{path}.log").read_text()
    return time.monotonic() - began


def killed_until_done(case, path, rng, *, seconds, max_kills):
    """Kill a run at random moments, go on with it, and again, until it is done.

    Returns:
        How often it was killed, and the longest time that other ranks took to end.
    """
    num_kills, slowest = 0, 0.0
    while True:
        ids = begin_or_go_on(case, path)
        if num_kills >= max_kills:
            assert wait(ids) == [0] * len(ids), Path(f"{path}.log").read_text()[-3000:]
            return num_kills, slowest
        time.sleep(rng.uniform(0.02, 0.9) * seconds)
        victim = rng.choice(ids)
        if os.waitpid(victim, os.WNOHANG)[0]:  # it was done already
            ids.remove(victim)
            wait(ids)
            return num_kills, slowest
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        wait(ids)
        slowest = max(slowest, time.monotonic() - began)
        num_kills += 1


def final_state(path):
    """Read everything that a finished run ends with."""
    state = RunDir(path).load_state()
    return state.step, {
        f"{group}/{name}": value for group, tensors in state.tensors.items() for name, value in tensors.items()
    }


def damage(path, rng):
    """Change a file in one of several ways; tell whether its bytes really changed."""
    if rng.random() < 0.1:
        path.unlink()
        return True
    before = path.read_bytes()
    after = damaged(before, rng)
    path.write_bytes(after)
    return after != before
