"""Compare two ways of doing the same work, in turn, and print one JSON line for each figure."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

LARGER_IS_BETTER = "/s"


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call."""
    start = clock()
    work()
    return clock() - start


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    unit: str = "s",
    runs: int = 5,
    amount: float = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time both in turn, after one run of each that is not counted, and print the medians.

    Args:
        name: what is measured.
        ours: does the work our way.
        peer: does the same work the other way.
        peer_name: whose way that is, with its version.
        unit: `s` or `ms` a run, or something a second, such as `texts/s`.
        runs: timed runs of each.
        amount: how much one run does, in what the unit counts (texts, images); figures are for one of them.
        clock: the wall clock; `time.process_time` for work of one thread on a busy machine.

    Returns:
        The line that was printed; `ratio` is how many times better ours is.
    """
    ours(), peer()
    times = [(seconds_of(ours, clock), seconds_of(peer, clock)) for _ in range(runs)]
    figures = [statistics.median(pair[side] for pair in times) / amount for side in (0, 1)]
    ratio = figures[1] / figures[0]
    if unit.endswith(LARGER_IS_BETTER):
        figures = [1 / figure for figure in figures]
    elif unit == "ms":
        figures = [1000 * figure for figure in figures]
    return report(name, *figures, peer_name=peer_name, unit=unit, runs=runs, ratio=ratio)


def report(
    name: str, ours: float, peer: float, *, peer_name: str, unit: str, runs: int, ratio: float
) -> dict[str, Any]:
    """Print one figure that was measured elsewhere, in the same form.

    Args:
        name: what was measured.
        ours: our figure.
        peer: the other's.
        peer_name: whose that is, with its version.
        unit: of both figures.
        runs: how many runs the figures are medians of.
        ratio: how many times better ours is.

    Returns:
        The line that was printed.
    """
    figures = {"ours": ours, "peer": peer, "ratio": ratio}
    line = {"name": name} | {key: float(f"{figure:.4g}") for key, figure in figures.items()}
    line |= {"peer_name": peer_name, "unit": unit, "runs": runs}
    sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
    sys.stdout.flush()
    return line
