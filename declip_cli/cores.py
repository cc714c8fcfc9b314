"""The cores of this machine that a process may use."""

import os


def own_cores() -> list[int]:
    """Number the cores that this process may use: those that the scheduler or the container has left it."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
