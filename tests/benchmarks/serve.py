"""Load on the search page: a million made-up vectors of 512 numbers, a ViT-B/32's text tower, clients beside it.

OMP_NUM_THREADS=2 python tests/benchmarks/serve.py [--images 1000000] [--index Flat]
"""

import argparse
import http.client
import json
import multiprocessing
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import numpy as np
import torch
from lines import report

from declip_cli.config import ModelConfig
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.evaluate.collection import Collection
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.nearest import EXACT, ApproximateIndex, quick_spec
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import DualEncoder
from declip_cli.model.preprocessing import Preprocessing
from declip_cli.serve.searcher import Searcher
from declip_cli.serve.server import SearchServer

AIM_MS = 100.0
DIM = 512
NUM_REQUESTS = 60
NUM_AT_ONCE = 50


def make_vectors(num: int) -> np.ndarray:
    """Draw unit vectors around a thousand centers, (N, D)."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((1000, DIM), dtype=np.float32)
    vectors = np.empty((num, DIM), dtype=np.float32)
    for first in range(0, num, 65536):
        part = vectors[first : first + 65536]
        part[:] = centers[random.integers(0, 1000, len(part))] + random.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def make_model() -> PretrainedModel:
    """Build a ViT-B/32 with random weights."""
    encoder = DualEncoder(find_architecture(ModelConfig(arch="vit-b32"))).eval()
    preprocessing = Preprocessing(image_side_px=224, resize_px=224)
    return PretrainedModel(
        encoder=encoder,
        name="random ViT-B/32",
        method="clip",
        arch="vit-b32",
        token_wise=False,
        preprocessing=preprocessing,
        context_length=encoder.architecture.text.context_length,
        fingerprint="random",
    )


def ask_ms(address: str, words: str) -> float:
    """Time one request of a client that is new to the server."""
    parts, start = urlsplit(address), time.perf_counter()
    connection = http.client.HTTPConnection(parts.netloc, timeout=120)
    connection.request("GET", f"{parts.path}search?{words}")
    assert json.loads(connection.getresponse().read())["hits"]
    connection.close()
    return 1000 * (time.perf_counter() - start)


def clients(address: str, results: multiprocessing.Queue) -> None:
    """Ask one after the other, then for many hits, then all at once; another process, as a browser is.

    Puts for each part its name, the times of its requests in ms, and the seconds that it took.
    """
    ask = partial(ask_ms, address)
    ask("text=warm+up")
    parts = {
        "a new text, 60 hits": [f"text=a+photo+of+thing+{number}&k=60" for number in range(NUM_REQUESTS)],
        "a text known, the next 60 hits": [f"text=a+photo+of+thing+{n}&k=60&offset=60" for n in range(NUM_REQUESTS)],
        "2,000 hits": [f"text=a+photo+of+thing+{number}&k=2000" for number in range(NUM_REQUESTS // 4)],
    }
    together = {
        f"{NUM_AT_ONCE} clients at once, 60 hits": [f"text=other+thing+{n}&k=60" for n in range(2 * NUM_AT_ONCE)]
    }
    results.put(("", [], 0.0))
    for name, words in (parts | together).items():
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_AT_ONCE if name in together else 1) as pool:
            times = list(pool.map(ask, words))
        results.put((name, times, time.perf_counter() - start))


def main() -> None:
    """Serve, ask, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--index", default="")
    given = parser.parse_args()
    vectors, rows = make_vectors(given.images), np.arange(given.images)
    spec = given.index or quick_spec(given.images, DIM) or EXACT
    index = ApproximateIndex.build(spec, vectors, rows) if spec != EXACT else None
    dataset = FilesDataset([f"photos/{number // 1000}/{number}.jpg" for number in range(given.images)])
    collection = Collection(dataset, range(given.images), vectors, rows, index=index)
    with SearchServer(Searcher(make_model(), collection, FeatureOptions()), log=print) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=clients, args=(server.address, results))
        process.start()
        results.get(timeout=500)
        about = f"{given.images} images, {spec}, {torch.get_num_threads()} threads"
        tell = partial(report, peer=AIM_MS, peer_name="the aim", unit="ms")
        for _ in range(4):
            start = time.process_time()
            name, times, seconds = results.get(timeout=500)
            cpu_ms = 1000 * (time.process_time() - start) / len(times)
            figure = statistics.median(times)
            tell(f"{name}; {about}", figure, runs=len(times), ratio=AIM_MS / figure)
            tell(f"{name}, CPU time of the server; {about}", cpu_ms, runs=len(times), ratio=AIM_MS / cpu_ms)
        process.join()
        server.shutdown()
    rate = len(times) / seconds
    report(f"requests at once; {about}", rate, 10, peer_name="the aim", unit="requests/s", runs=1, ratio=rate / 10)


if __name__ == "__main__":
    main()
