"""Nearest vectors by inner product: exact by default, approximate through faiss's index factory."""

import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from declip_cli.errors import EvaluateError

Vectors: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]

EXACT = "Flat"
_BLOCK_ROWS = 65536
"""Rows compared at once: 128 MiB of 512-d vectors."""
_MIN_CANDIDATES = 100
"""Least number of candidates that an approximate index is asked for; they are then scored exactly."""
_MIN_LISTS = 8
_SHARE_OF_LISTS = 16
"""At least 8 and at least a sixteenth of an inverted file's lists are searched."""
_TRAIN_ROWS_PER_LIST = 64
_MIN_TRAIN_ROWS = 65536


def load_faiss() -> Any:  # noqa: ANN401
    """Import faiss when it is first needed, and keep its threads out of torch's way.

    Both bring an OpenMP runtime. torch is imported first, and faiss gets as many threads as torch; on macOS,
    where two runtimes in one process are known to crash (faiss-wheels #73, pytorch #149201), it gets one.

    Returns:
        The module, or None where it is not installed or cannot be loaded.
    """
    try:
        import faiss
    except (ImportError, OSError):
        return None
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


def search_exact(vectors: Vectors, query: Vectors, k: int, *, dead: Rows) -> tuple[Vectors, Rows]:
    """Find the best rows by comparing all of them, block by block, so that vectors may lie on disk.

    Args:
        vectors: (N, D); may be memory-mapped.
        query: (D,).
        k: how many are wanted.
        dead: sorted numbers of rows that do not count, (n,).

    Returns:
        Inner products, best first, (K,), and their rows, (K,), with K = min(k, N - n). Of equal scores the
        earlier row comes first.
    """
    faiss = load_faiss()
    scores: list[Vectors] = []
    rows: list[Rows] = []
    for first in range(0, len(vectors), _BLOCK_ROWS):
        block = np.ascontiguousarray(vectors[first : first + _BLOCK_ROWS])
        num_dead = int(np.searchsorted(dead, first + len(block)) - np.searchsorted(dead, first))
        found = _best_of_block(faiss, block, query, min(len(block), k + num_dead))
        scores.append(found[0])
        rows.append(found[1] + first)
    return _best(np.concatenate(scores), np.concatenate(rows), k, dead)


def _best_of_block(faiss: Any, block: Vectors, query: Vectors, k: int) -> tuple[Vectors, Rows]:  # noqa: ANN401
    if faiss is None:
        top = (torch.from_numpy(block) @ torch.from_numpy(query)).topk(k)
        return top.values.numpy(), top.indices.numpy()
    found = faiss.knn(query[None], block, k, metric=faiss.METRIC_INNER_PRODUCT)  # what IndexFlatIP does
    return found[0][0], found[1][0]


def _best(scores: Vectors, rows: Rows, k: int, dead: Rows) -> tuple[Vectors, Rows]:
    is_live = ~np.isin(rows, dead)
    scores, rows = scores[is_live], rows[is_live]
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


class ApproximateIndex:
    """An index of faiss over vectors that also lie elsewhere; its candidates are scored exactly."""

    def __init__(self, index: Any, faiss: Any, spec: str) -> None:  # noqa: ANN401
        self._index, self._faiss, self.spec = index, faiss, spec

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @staticmethod
    def build(spec: str, vectors: Vectors) -> "ApproximateIndex":
        """Train an index, where it needs that, and add all vectors.

        Args:
            spec: for `faiss.index_factory`, such as `HNSW32` or `IVF4096,PQ64`.
            vectors: unit length, (N, D).

        Returns:
            The index.

        Raises:
            EvaluateError: faiss does not know the description, or there are too few vectors to train it.
        """
        faiss = load_faiss()
        if faiss is None:
            raise EvaluateError(
                f"--index {spec} needs faiss, which cannot be imported",
                remedy="pip install faiss-cpu, or leave --index away for exact search",
            )
        try:
            index = faiss.index_factory(vectors.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise EvaluateError(
                f"faiss cannot make an index {spec!r} of {vectors.shape[1]} dimensions",
                remedy='--index Flat, "HNSW32", "IVF256,Flat" or "IVF4096,PQ64"; see faiss\'s index factory',
            ) from error
        made = ApproximateIndex(index, faiss, spec)
        made._train(vectors)
        made.add(vectors)
        return made

    @staticmethod
    def read(path: Path, spec: str, *, is_mapped: bool) -> "ApproximateIndex":
        """Open a saved index.

        Args:
            path: written by `write`.
            spec: how it was made.
            is_mapped: leave it on disk, for searching only.

        Returns:
            The index.

        Raises:
            EvaluateError: it cannot be read.
        """
        faiss = load_faiss()
        flags = faiss.IO_FLAG_MMAP_IFC if is_mapped and hasattr(faiss, "IO_FLAG_MMAP_IFC") else 0
        try:
            return ApproximateIndex(faiss.read_index(str(path), flags), faiss, spec)
        except (RuntimeError, AttributeError) as error:
            raise EvaluateError(f"cannot read the index {path}: {error}", remedy=f"delete {path.parent}") from error

    @property
    def needs_training(self) -> bool:
        """Whether its quality depends on the vectors it was trained on."""
        return self._lists() is not None or "PQ" in self.spec or "PCA" in self.spec or "SQ" in self.spec

    def add(self, vectors: Vectors) -> None:
        """Add vectors, block by block, (n, D)."""
        for first in range(0, len(vectors), _BLOCK_ROWS):
            self._index.add(np.ascontiguousarray(vectors[first : first + _BLOCK_ROWS]))

    def write(self, path: Path) -> None:
        """Save, whole or not at all."""
        temporary = path.with_name(path.name + ".tmp")
        self._faiss.write_index(self._index, str(temporary))
        temporary.replace(path)

    def search(self, vectors: Vectors, query: Vectors, k: int, *, dead: Rows) -> tuple[Vectors, Rows]:
        """Find good rows; arguments and result as of `search_exact`, scores exact, rows approximate."""
        wanted = max(4 * k, _MIN_CANDIDATES)
        while True:
            wanted = min(wanted, len(self))
            self._widen(wanted)
            rows = self._index.search(query[None], wanted)[1][0].astype(np.int64)
            rows = np.unique(rows[rows >= 0])
            scores, rows = _best(vectors[rows] @ query, rows, k, dead)
            if len(rows) >= k or wanted >= len(self):
                return scores, rows
            wanted *= 4

    def _lists(self) -> Any:  # noqa: ANN401
        return self._faiss.try_extract_index_ivf(self._index)

    def _train(self, vectors: Vectors) -> None:
        lists = self._lists()
        num_lists = int(lists.nlist) if lists is not None else 0
        if num_lists > len(vectors):
            raise EvaluateError(
                f"--index {self.spec} needs at least {num_lists} pictures to train on (found {len(vectors)})",
                remedy=f"--index IVF{max(1, len(vectors) // 40)},Flat or leave --index away for exact search",
            )
        step = max(1, len(vectors) // max(_MIN_TRAIN_ROWS, _TRAIN_ROWS_PER_LIST * num_lists))
        sample = np.ascontiguousarray(vectors[::step])
        try:
            self._index.train(sample)
        except RuntimeError as error:
            raise EvaluateError(
                f"--index {self.spec} cannot be trained on {len(sample)} pictures: {_reason(error)}",
                remedy="leave --index away for exact search, which is fast up to a million pictures",
            ) from error

    def _widen(self, wanted: int) -> None:
        space = self._faiss.ParameterSpace()
        lists = self._lists()
        if lists is not None:
            lists.nprobe = min(int(lists.nlist), max(_MIN_LISTS, int(lists.nlist) // _SHARE_OF_LISTS))
        if "HNSW" in self.spec and lists is None:
            space.set_index_parameter(self._index, "efSearch", max(64, wanted))


def _reason(error: RuntimeError) -> str:
    return str(error).rpartition("failed: ")[2] or str(error)
