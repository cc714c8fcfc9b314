"""Searches for nearest neighbors: how often each finds the right row, and how long it takes.

`python tests/benchmarks/neighbors.py --model RUN --captions FILE.jsonl ...` prints one JSON line per search. The rows
are text features of distinct views (plain, augmented, masked) of the captions; without `--captions` those of the demo
corpus, without `--model` those of random weights.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lines import seconds_of
from torch import Tensor

from declip_cli.config import AugmentConfig, ModelConfig, TextView
from declip_cli.data.catalog import open_dataset
from declip_cli.data.text_views import TextViews
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.interop.read import load_model
from declip_cli.model import neighbors
from declip_cli.model.architectures import find_architecture
from declip_cli.model.clip import DualEncoder

VIEWS: tuple[TextView, ...] = ("plain", "augmented", "masked")
BLOCK_ROWS = 8192
MAX_ROUNDS = 200

Search = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def read_captions(files: list[Path]) -> list[str]:
    """Read distinct captions from JSON lines with the key `caption`."""
    if not files:
        demo = [open_dataset("demo", split) for split in ("train", "test")]
        return list(dict.fromkeys(text for part in demo for n in range(len(part)) for text in part.captions(n)))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(json.loads(line)["caption"] for line in lines))


def draw_texts(captions: list[str], num: int, context_length: int) -> tuple[list[list[int]], list[int]]:
    """Draw distinct views of captions in random order, with the position of their caption."""
    rng = random.Random(0)
    views = TextViews(AugmentConfig(), Tokenizer(context_length))
    found: dict[tuple[int, ...], int] = {}
    for _ in range(MAX_ROUNDS):
        for number, caption in enumerate(captions):
            ids, _ = views.draw(rng.choice(VIEWS), caption, rng)
            found.setdefault(tuple(ids), number)
        if len(found) >= num:
            break
    texts = rng.sample(sorted(found), min(num, len(found)))
    return [list(text) for text in texts], [found[text] for text in texts]


@torch.no_grad()
def encode(encoder: DualEncoder, texts: list[list[int]], *, device: torch.device, batch_size: int = 256) -> Tensor:
    """Embed token ids, → unit length, (N, D)."""
    parts = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        tokens = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        for row, ids in enumerate(part):
            tokens[row, : len(ids)] = torch.tensor(ids)
        parts.append(F.normalize(encoder.encode_text(tokens.to(device)), dim=1))
    return torch.cat(parts)


def widened(features: Tensor, dim: int) -> Tensor:
    """Turn features into more dimensions; cosines stay."""
    if dim <= features.shape[1]:
        return features
    basis, _ = torch.linalg.qr(torch.randn(dim, features.shape[1], generator=torch.Generator().manual_seed(0)))
    return F.normalize(features @ basis.T.to(features), dim=1)


def rounded_search(dtype: torch.dtype) -> Search:
    """Make a search that compares rounded vectors only and trusts the largest rounded product."""

    def search(queries: Tensor, rows: Tensor, numbers: Tensor | None, owners: Tensor) -> Tensor:
        best = torch.full((len(queries),), float("-inf"), dtype=dtype, device=queries.device)
        best_row = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        low = queries.to(dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            scores = neighbors._mask_own(low @ rows[block].to(dtype).T, numbers, owners[block])
            score, row = scores.max(1)
            is_better = score > best
            best, best_row = torch.where(is_better, score, best), torch.where(is_better, row + start, best_row)
        return best_row

    return search


def true_best(queries: Tensor, rows: Tensor, numbers: Tensor | None, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Search in float64, → positions (B,) and the lead over the second best cosine (B,)."""
    scores = neighbors._mask_own(queries.double() @ rows.double().T, numbers, owners)
    values, places = scores.topk(2, dim=1)
    return places[:, 0], values[:, 0] - values[:, 1]


def measure(name: str, search: Search, case: tuple[Tensor, Tensor, Tensor | None, Tensor], *, runs: int) -> None:
    """Print recall against a float64 search, the share of queries searched exactly, and the median time."""
    queries, rows, numbers, _ = case
    exactly: list[int] = []
    find_exactly = neighbors._find_exactly

    def counted(*arguments: Tensor) -> Tensor:
        exactly.append(len(arguments[0]))
        return find_exactly(*arguments)

    def work() -> None:
        search(*case)
        if queries.is_cuda:
            torch.cuda.synchronize()

    neighbors._find_exactly = counted
    found = search(*case)
    neighbors._find_exactly = find_exactly
    best, lead = true_best(*case)
    work()
    clock = time.perf_counter if queries.is_cuda or torch.get_num_threads() > 1 else time.process_time
    seconds = statistics.median(seconds_of(work, clock) for _ in range(runs))
    line = {
        "name": f"nearest of {len(rows)} rows",
        "search": name,
        "own_pair": "returned" if numbers is None else "left out",
        "num_queries": len(queries),
        "dim": rows.shape[1],
        "recall_at_1": float((found == best).float().mean()),
        "searched_exactly": sum(exactly) / len(queries),
        "lead_below_3e-4": float((lead < 3e-4).float().mean()),
        "median_ms": round(1000 * seconds, 3),
        "runs": runs,
        "device": torch.cuda.get_device_name() if queries.is_cuda else f"cpu, {torch.get_num_threads()} thread(s)",
    }
    sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--captions", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    if options.model:
        encoder = load_model(options.model, device=device).encoder
    else:
        encoder = DualEncoder(find_architecture(ModelConfig(arch="vit-tiny32"))).to(device).eval()
    captions = read_captions(options.captions)
    context_length = encoder.architecture.text.context_length
    texts, owners = draw_texts(captions, options.rows + options.queries, context_length)
    features = encode(encoder, texts, device=device)
    features = widened(features, options.dim)
    numbers = torch.tensor(owners, device=device)
    queries, rows = features[: options.queries], features[options.queries :]
    half_rows = rows.half()
    searches: dict[str, Search] = {
        "float32, exact": neighbors._find_exactly,
        "bfloat16 alone": rounded_search(torch.bfloat16),
        "float16 alone": rounded_search(torch.float16),
        "float16, then float32": lambda q, r, n, o: neighbors._find_screened(q, r, half_rows, n, o),
    }
    for query_numbers in (None, numbers[: options.queries]):
        for name, search in searches.items():
            measure(name, search, (queries, rows, query_numbers, numbers[options.queries :]), runs=options.runs)


if __name__ == "__main__":
    main()
