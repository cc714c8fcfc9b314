"""Nearest vectors by inner product: exact by default, approximate through an index of FAISS over the store's rows."""

import secrets
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from declip_cli.errors import EvaluateError
from declip_cli.evaluate.vectors import Rows, Vectors, VectorStore

EXACT = "Flat"
QUICK_ROWS = 200_000
"""From so many vectors on codes are compared first: all of them would take over 40 ms on two cores."""
Found = tuple[Vectors, Rows]
"""Inner products, best first, (K,), and their rows, (K,)."""
_BLOCK_ROWS = 65536
"""Rows compared or added at once: 128 MiB of 512-d vectors."""
_MIN_CANDIDATES = 100
"""Least number of candidates that an approximate index is asked for; they are then scored exactly."""
_MIN_CODED_CANDIDATES = 4096
"""The same of an index whose codes of four bits are coarse and quick to compare."""
_MIN_LISTS = 8
_SHARE_OF_LISTS = 16
"""At least 8 and at least a sixteenth of an inverted file's lists are searched."""
_MAX_DELETED = 0.2
"""Above this share of rows without an image a saved index is rebuilt."""
_GROWTH = 2
"""A saved index is rebuilt, and so trained again, when there are so many times more rows than it was built of."""
_TRAIN_ROWS_PER_LIST = 64
_MIN_TRAIN_ROWS = 65536


def search_exact(vectors: Vectors, rows: Rows, queries: Vectors, k: int) -> list[Found]:
    """Find the best rows by comparing all of them, block by block, so that vectors may lie on disk.

    Args:
        vectors: (V, D); may be memory-mapped.
        rows: those that count, ascending, (N,).
        queries: (Q, D); several together take little longer than one.
        k: how many are wanted, at least 1.

    Returns:
        For each query the inner products, best first, (K,), and their rows, (K,), with K = min(k, N). Of equal scores
        the earlier row comes first.
    """
    found = [(np.empty(0, dtype=np.float32), rows[:0])] * len(queries)
    for first in range(0, len(rows), _BLOCK_ROWS):
        block = rows[first : first + _BLOCK_ROWS]
        is_whole = block[-1] - block[0] + 1 == len(block)
        part = vectors[block[0] : block[-1] + 1] if is_whole else vectors[block]  # (n, D)
        scores = np.ascontiguousarray((part @ queries.T).T)  # (Q, n)
        found = [_better(*pair, block, k) for pair in zip(found, scores, strict=True)]
    # Scored again, since a product of several queries rounds otherwise than that of one.
    near = [np.sort(good) for _, good in found]  # (K,) each
    return [best(vectors[good] @ query, good, k) for good, query in zip(near, queries, strict=True)]


def _better(found: Found, scores: Vectors, rows: Rows, k: int) -> Found:
    """Take the k best of what was found and later rows (n,) with their scores (n,)."""
    if len(found[0]) == k:
        good = (scores > found[0][-1]).nonzero()[0]  # of equal scores the earlier row stays
        scores, rows = scores[good], rows[good]
    return best(np.concatenate([found[0], scores]), np.concatenate([found[1], rows]), k)


def best(scores: Vectors, rows: Rows, k: int) -> Found:
    """Take the k best of scores (N,) and their rows (N,); order as in `search_exact`."""
    if k < len(scores):
        good = (scores >= np.partition(scores, -k)[-k]).nonzero()[0]
        scores, rows = scores[good], rows[good]
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def quick_spec(num_rows: int, dim: int) -> str:
    """Describe the index that a large collection is searched by where nothing else is asked for.

    Codes of 2 bits a number are compared first, a sixteenth of the vectors' memory, then thousands of candidates
    exactly. Of 400,000 made-up vectors of 512 numbers, in clusters or not, all of the best 10 are found, 99.98 % of
    the best 60 and 97.8 % of the best 500 (`tests/benchmarks/index_recall.py`).

    Returns:
        Empty for a collection that is compared as a whole just as well.
    """
    return f"PQ{dim // 2}x4fs" if num_rows >= QUICK_ROWS and dim % 2 == 0 else ""


class ApproximateIndex:
    """An index of FAISS over rows of a store; its candidates are scored exactly."""

    def __init__(self, index: Any, spec: str) -> None:  # noqa: ANN401
        self._index, self.spec = index, spec
        # Two OpenMP runtimes in one process are known to crash on macOS (faiss-wheels #73, pytorch #149201).
        faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())

    @staticmethod
    def build(spec: str, vectors: Vectors, rows: Rows) -> "ApproximateIndex":
        """Train an index, where it needs that, and add rows (N,) of unit vectors (V, D).

        Raises:
            EvaluateError: `faiss.index_factory` does not know the description, or there are too few vectors to train.
        """
        try:
            index = faiss.index_factory(vectors.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise EvaluateError(
                f"faiss cannot make an index {spec!r} of {vectors.shape[1]} dimensions",
                remedy='--index Flat, "HNSW32", "IVF256,Flat" or "IVF4096,PQ64"; see faiss\'s index factory',
            ) from error
        made = ApproximateIndex(faiss.IndexIDMap2(index), spec)
        made._train(vectors, rows)
        made.add(vectors, rows)
        return made

    @staticmethod
    def read(path: Path, spec: str) -> "ApproximateIndex | None":
        """Open a saved index; None if it is missing or damaged."""
        try:
            return ApproximateIndex(faiss.read_index(str(path)), spec)
        except (RuntimeError, MemoryError):
            return None

    def write(self, path: Path) -> None:
        """Save, whole or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        faiss.write_index(self._index, str(temporary))
        temporary.replace(path)

    @property
    def rows(self) -> Rows:
        """The rows in the index, (N,)."""
        return np.asarray(faiss.vector_to_array(self._index.id_map), dtype=np.int64)

    def add(self, vectors: Vectors, rows: Rows) -> None:
        """Add rows, block by block."""
        for block in np.array_split(rows, max(1, len(rows) // _BLOCK_ROWS)):
            self._index.add_with_ids(np.ascontiguousarray(vectors[block]), block)

    def search(self, vectors: Vectors, rows: Rows, queries: Vectors, k: int) -> list[Found]:
        """Find good rows; arguments and result as in `search_exact`, scores exact, rows approximate."""
        wanted = max(8 * k, _MIN_CODED_CANDIDATES) if "x4fs" in self.spec else max(4 * k, _MIN_CANDIDATES)
        return self._search(vectors, rows, queries, k, wanted)

    def _search(self, vectors: Vectors, rows: Rows, queries: Vectors, k: int, wanted: int) -> list[Found]:
        """Search with a number of candidates, and with more where too few of them count."""
        num_all = int(self._index.ntotal)
        wanted = min(wanted, num_all)
        inner = faiss.downcast_index(self._index.index)
        lists = faiss.try_extract_index_ivf(inner)
        if lists is not None:
            lists.nprobe = min(int(lists.nlist), max(_MIN_LISTS, int(lists.nlist) // _SHARE_OF_LISTS))
        elif "HNSW" in self.spec:
            faiss.ParameterSpace().set_index_parameter(inner, "efSearch", max(64, wanted))
        found = list[Found]()
        for query, near in zip(queries, self._index.search(queries, wanted)[1], strict=True):  # (D,), (C,)
            near = np.unique(near)
            near = near[rows[np.searchsorted(rows, near).clip(max=len(rows) - 1)] == near]  # those that count
            if len(near) >= min(k, len(rows)) or wanted == num_all:
                found.append(best(vectors[near] @ query, near, k))
            else:
                found += self._search(vectors, rows, query[None], k, 4 * wanted)
        return found

    def _train(self, vectors: Vectors, rows: Rows) -> None:
        lists = faiss.try_extract_index_ivf(self._index.index)
        num_lists = int(lists.nlist) if lists is not None else 0
        if num_lists > len(rows):
            raise EvaluateError(
                f"--index {self.spec} needs at least {num_lists} images to train on (found {len(rows)})",
                remedy=f"--index IVF{max(1, len(rows) // 40)},Flat or omit --index for exact search",
            )
        step = max(1, len(rows) // max(_MIN_TRAIN_ROWS, _TRAIN_ROWS_PER_LIST * num_lists))
        sample = np.ascontiguousarray(vectors[rows[::step]])
        try:
            self._index.train(sample)
        except RuntimeError as error:
            raise EvaluateError(
                f"--index {self.spec} cannot be trained on {len(sample)} images: "
                f"{str(error).rpartition('failed: ')[2] or error}",
                remedy="omit --index for exact search, which is fast up to a million images",
            ) from error


def saved_index(store: VectorStore, vectors: Vectors, rows: Rows, spec: str) -> ApproximateIndex | None:
    """Bring the index that is saved with a store up to date.

    Args:
        store: where it is saved.
        vectors: all rows, (V, D).
        rows: those that count, ascending, (N,).
        spec: a description for `faiss.index_factory`, or `Flat`, which needs no index; empty keeps what there is.

    Raises:
        EvaluateError: there is no image, or the index cannot be made.
    """
    if not len(rows):
        raise EvaluateError(
            f"the index {store.folder} holds no image that can be read", remedy="check that the files are images"
        )
    facts = store.facts()
    previous, saved = facts.get("index_file", ""), facts.get("index", EXACT)
    spec = spec or saved
    if spec == EXACT:
        index, name = None, ""
    else:
        index = ApproximateIndex.read(store.folder / previous, spec) if previous and spec == saved else None
        there = index.rows if index is not None else rows[:0]
        missing, deleted = np.setdiff1d(rows, there), np.setdiff1d(there, rows)
        is_stale = len(rows) > _GROWTH * int(facts.get("num_built", 0)) or len(deleted) > _MAX_DELETED * len(rows)
        if index is not None and not is_stale and not len(missing):
            return index
        if index is None or is_stale:
            index = ApproximateIndex.build(spec, vectors, rows)
            store.set(num_built=len(rows))
        else:
            index.add(vectors, missing)
        name = f"index-{secrets.token_hex(6)}.faiss"
        index.write(store.folder / name)
    store.set(index=spec, index_file=name)
    if previous:
        (store.folder / previous).unlink(missing_ok=True)
    return index
