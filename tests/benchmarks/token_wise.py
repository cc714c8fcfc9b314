"""FILIP's token-wise loss: against autograd through blocks computed again, and as a share of a step.

One process plays one of `--ranks`: its `--local` pairs are compared with the keys of all, forward and backward, in both
directions. `--arithmetic` prints what the loss of a whole batch takes on a GPU instead, and measures nothing.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from declip_cli.batch import Embeddings
from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.methods.registry import build_method
from declip_cli.token_wise_losses import token_wise_similarity
from tests.benchmarks.lines import compare
from tests.benchmarks.made_up_batches import autocast, make_batch

PATCHES, TOP_K, WIDTH = 49, 16, 256
CHUNK_ELEMENTS = 2**25
PEAK_FLOPS, PEAK_BYTES_S, STEP_SHARE_OF_PEAK = 989e12, 3.35e12, 0.4
"""Of an H100 (SXM) in bfloat16; and what a training step reaches of the former."""
TOWER_FLOPS = 3 * 2 * (4.41e9 + 0.0378e9 * 32)
"""Forward and backward of a pair: ViT-B/32 on an image (4.41 G multiplications), 37.8 M weights on 32 text tokens."""


def recomputed(queries: Tensor, keys: Tensor, *, query_mask: Tensor) -> Tensor:
    """Score as `token_wise_similarity` does, every block computed again in backward by autograd."""

    def scores(query: Tensor, mask: Tensor) -> Tensor:
        similarity = (query.flatten(0, 1) @ keys.flatten(0, 1).T).view(*query.shape[:2], *keys.shape[:2])
        is_counted = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        best = similarity.masked_fill(~is_counted, -2.0).amax(3).float()
        return (best * (mask / mask.sum(1, keepdim=True))[..., None]).sum(1)

    size = max(1, CHUNK_ELEMENTS // (queries.shape[1] * keys.shape[0] * keys.shape[1]))
    pieces = zip(queries.split(size), query_mask.split(size), strict=True)
    return torch.cat([checkpoint(scores, *piece, use_reentrant=False) for piece in pieces])


def both_directions(similarity, options: argparse.Namespace, device: torch.device):
    """Compare patches with texts and tokens with images, and pull both back."""
    num_keys = options.ranks * options.local
    sides = []
    for num_tokens in (PATCHES, options.length):
        queries = F.normalize(torch.randn(options.local, num_tokens, WIDTH, device=device), dim=-1).requires_grad_()
        keys = F.normalize(torch.randn(num_keys, TOP_K, WIDTH, device=device), dim=-1).requires_grad_()
        sides.append((queries, keys, torch.ones(queries.shape[:2], dtype=torch.bool, device=device)))
    rows = torch.arange(options.local, device=device)

    def work() -> None:
        for queries, keys, mask in sides:
            with autocast(options.precision, device)():
                scores = similarity(queries, keys, query_mask=mask)
            F.cross_entropy(14.3 * scores, rows).backward()
            queries.grad = keys.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work


def towers(options: argparse.Namespace, device: torch.device):
    """Encode the local pairs and pull back through both towers: the rest of a step, but for the optimizer."""
    method = build_method(ModelConfig(arch="vit-b32"), MethodConfig(name="filip")).to(device).train()
    settings = argparse.Namespace(batch_size=options.local, captions="normal", ungrouped=True)
    batch = make_batch(method, settings, device)

    def work() -> None:
        with autocast(options.precision, device)():
            embeddings: Embeddings = method.embed(batch)
        (embeddings.image_tokens.sum() + embeddings.text_tokens.sum()).backward()
        method.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work


def arithmetic(local: int, ranks: int, length: int) -> dict[str, float]:
    """Count what the loss takes on one GPU of many: operations, bytes of blocks, and the least time of both.

    Three matrix products a direction: similarities, and the two gradients from the places of the best matches. A fused
    kernel would keep the blocks in registers; operations of this size are left to it as well.
    """
    pairs = local * (PATCHES + length) * ranks * local * TOP_K  # similarities in both directions
    flops = 3 * 2 * pairs * WIDTH
    # Of each similarity, 2 bytes: written, read; a zero written; read twice. Of each best match: a byte and a gradient.
    num_bytes = pairs * 2 * 5 + pairs / TOP_K * (2 * 1 + 2 * 4 + 8)
    step_s = local * TOWER_FLOPS / (PEAK_FLOPS * STEP_SHARE_OF_PEAK)
    fused_s = flops / (0.7 * PEAK_FLOPS)
    return {
        "local pairs": local,
        "ranks": ranks,
        "TFLOP": round(flops / 1e12, 2),
        "share of the towers' FLOP": round(flops / (local * TOWER_FLOPS), 3),
        "GB moved": round(num_bytes / 1e9, 1),
        "towers ms": round(1e3 * step_s, 1),
        "least ms fused": round(1e3 * fused_s, 1),
        "least share of the step fused": round(fused_s / (step_s + fused_s), 3),
        "least ms in blocks": round(1e3 * (fused_s + num_bytes / PEAK_BYTES_S), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--length", type=int, default=32, help="tokens of the longest text")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arithmetic", action="store_true")
    options = parser.parse_args()
    if options.arithmetic:
        for local, ranks in ((512, 8), (512, 64), (128, 1024)):
            print(json.dumps(arithmetic(local, ranks, options.length)))
        return
    torch.set_num_threads(1)
    device = torch.device(options.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    ours, plain = (both_directions(work, options, device) for work in (token_wise_similarity, recomputed))
    named = {"runs": options.runs, "clock": clock, "unit": "ms"}
    shape = f"{options.local} of {options.local * options.ranks} pairs, {options.precision}"
    found = compare(f"token-wise loss, {shape}", ours, plain, peer_name="autograd, blocks computed again", **named)
    step = compare(
        f"its time beside the towers', {shape}", ours, towers(options, device), peer_name="both towers", **named
    )
    for name, loss in (("share of a step", step["ours"]), ("share of a step before", step["ours"] * found["ratio"])):
        print(json.dumps({"name": name, "value": round(loss / (loss + step["peer"]), 3)}))


if __name__ == "__main__":
    main()
