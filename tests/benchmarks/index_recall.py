"""How many of the best images an approximate index finds, of made-up features of three kinds.

OMP_NUM_THREADS=1 python tests/benchmarks/index_recall.py [--images 400000] [--index HNSW32] [--kinds …]
"""

import argparse
import time
from functools import partial

import numpy as np
from lines import report

from declip_cli.evaluate.nearest import QUICK_ROWS, ApproximateIndex, quick_spec, search_exact

DIM = 512
NUM_QUERIES = 100
DEPTHS = (10, 60, 500, 2000)
NUM_CLUSTERS = 1000


def unit(rows: np.ndarray) -> np.ndarray:
    """Divide rows by their lengths, in place."""
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def make(kind: str, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images (N, D) and queries (Q, D).

    `even`: directions without any structure. `clusters`: around a thousand centers. `gap`: around centers, the variance
    falling from direction to direction, about a common mean; the queries about another mean, as texts are.
    """
    draw = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    if kind == "even":
        return unit(draw((num, DIM))), unit(draw((NUM_QUERIES, DIM)))
    centers, means = draw((NUM_CLUSTERS, DIM)), unit(draw((2, DIM)))
    spectrum = np.linalg.qr(draw((DIM, DIM)))[0]
    if kind == "gap":
        spectrum = (1 / np.sqrt(10 + np.arange(DIM, dtype=np.float32)))[:, None] * spectrum
    numbers = np.random.default_rng(1).integers(0, NUM_CLUSTERS, num + NUM_QUERIES)
    rows = np.empty((num + NUM_QUERIES, DIM), dtype=np.float32)
    for first in range(0, len(rows), 65536):
        own = slice(first, first + 65536)
        rows[own] = unit((centers[numbers[own]] + draw(rows[own].shape)) @ spectrum)
    images, queries = rows[:num], rows[num:]
    if kind == "gap":
        queries = unit(0.3 * queries + 0.15 * unit(draw(queries.shape)) + 0.9 * means[1])
        images += means[0]
        unit(images)
    return images, queries


def main() -> None:
    """Print the shares found, and the CPU time of a query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--index", default="")
    parser.add_argument("--kinds", nargs="+", default=["even", "clusters", "gap"])
    given = parser.parse_args()
    spec = given.index or quick_spec(QUICK_ROWS, DIM)
    for kind in given.kinds:
        images, queries = make(kind, given.images)
        rows = np.arange(given.images)
        start = time.process_time()
        index = ApproximateIndex.build(spec, images, rows)
        about = f"{spec}, {given.images} images, {kind}"
        seconds = time.process_time() - start
        report(f"build; {about}", seconds, seconds, peer_name="-", unit="s", runs=1, ratio=1)
        for k in DEPTHS:
            start = time.process_time()
            found = index.search(images, rows, queries, k)
            middle = time.process_time()
            exact = search_exact(images, rows, queries, k)
            taken = [1000 * seconds / len(queries) for seconds in (middle - start, time.process_time() - middle)]
            share = np.mean([np.isin(good, got).mean() for (_, got), (_, good) in zip(found, exact, strict=True)])
            report(f"of the best {k}; {about}", share, 1, peer_name="all compared", unit="found", runs=1, ratio=share)
            report(
                f"a query of {len(queries)}, {k} hits; {about}",
                *taken,
                peer_name="all compared",
                unit="ms",
                runs=1,
                ratio=taken[1] / taken[0],
            )


if __name__ == "__main__":
    main()
