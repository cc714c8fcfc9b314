"""Recall against CLIP_benchmark's at the sizes of Flickr30k and COCO; search among a million vectors."""

import importlib.metadata
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from lines import report, seconds_of
from torch.nn import functional as F

from declip_cli.evaluate.metrics import paired_ranks, recall_at
from declip_cli.evaluate.nearest import ApproximateIndex, search_exact

RECALLS = (1, 5, 10)
PAGE_BYTES = 4096


def make_pairs(num_images: int, dim: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw images and five captions near each."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(num_images, dim), dim=1)
    image_ids = torch.arange(num_images).repeat_interleave(5)
    texts = F.normalize(images[image_ids] + 0.32 * torch.randn(len(image_ids), dim), dim=1)
    return images, texts, image_ids


def their_recalls(images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor) -> list[float]:
    """Compute recalls as the peer's `evaluate` does, once it has the embeddings."""
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_ids] = True
    recalls = []
    for k in RECALLS:
        for rows, right in ((scores, positive), (scores.T, positive.T)):
            recalls.append((batchify(recall_at_k, rows, right, 64, "cpu", k=k) > 0).float().mean().item())
    return recalls


def our_recalls(images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor) -> list[float]:
    """Compute the same recalls; ranks in the median and mean come along."""
    ranks = paired_ranks(images, texts, image_ids)
    return [recall_at(r, k) for k in RECALLS for r in (ranks.text_to_image, ranks.image_to_text)]


def peak_mib(work: Callable[[], object]) -> float:
    """Measure how much more memory a call holds at its peak than before it."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20

    before, peak, is_done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    is_done.set()
    watcher.join()
    return max(1.0, peak[0] - before)


def retrieval(*, runs: int, with_coco: bool) -> None:
    """Time recall@1, 5 and 10 both ways on given embeddings, and measure the memory that takes."""
    peer_name = f"clip_benchmark {importlib.metadata.version('clip_benchmark')} zeroshot_retrieval"
    for name, num_images in (("Flickr30k 1k x 5k", 1000), ("COCO 5k x 25k", 5000)):
        if num_images > 1000 and not with_coco:
            continue
        pairs = make_pairs(num_images)
        # Scores that lie nearer than float32 rounds may change places: one query may fall on the other side of k.
        num_queries = [len(pairs[1]), len(pairs[0])] * len(RECALLS)
        found = zip(our_recalls(*pairs), their_recalls(*pairs), num_queries, strict=True)
        assert all(abs(a - b) * num < 1.01 for a, b, num in found), "the recalls differ"
        peer_runs = runs if num_images == 1000 else 1
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(runs):
            times[0].append(seconds_of(lambda pairs=pairs: our_recalls(*pairs), time.process_time))
            if number < peer_runs:
                times[1].append(seconds_of(lambda pairs=pairs: their_recalls(*pairs), time.process_time))
        ours, peer = (1000 * statistics.median(seconds) for seconds in times)
        report(f"recall {name}", ours, peer, peer_name=peer_name, unit="ms", runs=runs, ratio=peer / ours)
        memory = [peak_mib(lambda pairs=pairs, f=f: f(*pairs)) for f in (our_recalls, their_recalls)]
        ratio = memory[1] / memory[0]
        report(f"recall {name}, memory", *memory, peer_name=peer_name, unit="MiB", runs=1, ratio=ratio)


def search(*, runs: int, num_vectors: int, spec: str) -> None:
    """Time one query among many vectors, exactly and through an index, against a plain numpy product."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((num_vectors // 50 + 1, 512), dtype=np.float32)
    vectors = np.empty((num_vectors, 512), dtype=np.float32)
    for first in range(0, num_vectors, 65536):
        part = vectors[first : first + 65536]
        part[:] = centers[random.integers(0, len(centers), len(part))]
        part += 0.7 * random.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    query, rows = vectors[7], np.arange(num_vectors)

    def plain() -> set[int]:
        scores = vectors @ query
        return set(np.argpartition(-scores, 10)[:10].tolist())

    ways: dict[str, Callable[[], set[int]]] = {
        "exact": lambda: set(search_exact(vectors, rows, query[None], 10)[0][1].tolist())
    }
    if spec:
        start = time.perf_counter()
        index = ApproximateIndex.build(spec, vectors, rows)
        seconds = time.perf_counter() - start
        report(f"build {spec} of {num_vectors} vectors", seconds, seconds, peer_name="-", unit="s", runs=1, ratio=1.0)
        ways[spec] = lambda: set(index.search(vectors, rows, query[None], 10)[0][1].tolist())
    best = plain()
    for name, way in ways.items():
        found = way()
        ours, peer = (1000 * statistics.median(seconds_of(work) for _ in range(max(3, runs))) for work in (way, plain))
        label = f"one query among {num_vectors} vectors of 512, {name}, {len(found & best)} of 10 found"
        report(label, ours, peer, peer_name="numpy product and argpartition", unit="ms", runs=runs, ratio=peer / ours)
