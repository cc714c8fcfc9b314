"""Recorded runs of the original code: weights, inputs, losses and gradients (tests/golden/README.md)."""

import functools
import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from declip_cli.batch import Batch
from declip_cli.config import MethodConfig
from declip_cli.interop.original import from_original, original_ids
from declip_cli.methods.base import Method
from declip_cli.methods.registry import METHODS
from declip_cli.model.architectures import Architecture, ResNetDims, TextDims, VitDims
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import TOKEN_WISE_DIM, SimClrHead

GOLDEN_DIR = Path(os.environ.get("DECLIP_GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_cases(*, world: int, methods: tuple[str, ...]) -> list[str]:
    """Name the recordings there are for some methods; a folder without any is an error, not a skipped test."""
    names = sorted(p.stem for m in methods for p in GOLDEN_DIR.glob(f"{m}_*_world{world}.npz"))
    missing = [m for m in methods if not any(n.startswith(f"{m}_") for n in names)]
    if missing:
        raise FileNotFoundError(f"no recording of {missing} for {world} process(es) in {GOLDEN_DIR}")
    return names


def golden_case(method: str, *, arch: str = "vit") -> str:
    """Name one single-process recording of a method, whatever its seed."""
    return next(name for name in golden_cases(world=1, methods=(method,)) if f"_{arch}_" in name)


@dataclass(frozen=True)
class Golden:
    meta: dict
    arrays: dict[str, np.ndarray]

    @property
    def num_local(self) -> int:
        return self.meta["n_per_rank"]


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN_DIR / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return Golden(meta=json.loads(str(arrays.pop("meta"))), arrays=arrays)


@functools.cache
def _draw(name: str, rule: str) -> Tensor:
    kind, *rest = json.loads(rule)
    if kind == "const":
        value, shape = rest
        return torch.full(tuple(shape), float(value))
    shape = tuple(rest[0])
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        x = x / np.float32(math.sqrt(math.prod(shape[1:])))
    elif name.endswith("weight"):
        x = 1 + np.float32(0.1) * x
    else:
        x = np.float32(0.1) * x
    if kind == "abs1":
        x = 1 + np.abs(x)
    return torch.from_numpy(x)


def golden_state(golden: Golden) -> dict[str, Tensor]:
    """Draw the weights of a recording; do not change them, the next who asks gets the same."""
    return {name: _draw(name, json.dumps(rule)) for name, rule in golden.meta["spec"].items()}


def golden_method(golden: Golden, **options) -> Method:
    """Build our method with the recording's weights."""
    spec = golden.meta["spec"]
    is_vit = golden.meta["arch"] == "vit"
    vision = (
        VitDims(patch_side_px=8, width=64, num_layers=2, num_heads=2)
        if is_vit
        else ResNetDims(num_blocks=(1, 1, 1, 1), width=16, num_heads=4)
    )
    architecture = Architecture(
        image_side_px=32 if is_vit else 224,
        embed_dim=64,
        vision=vision,
        text=TextDims(context_length=24, width=48, num_layers=2, num_heads=4),
    )
    kind = METHODS[golden.meta["method"]]
    encoder = DualEncoder(architecture, token_wise_dim=TOKEN_WISE_DIM if kind.is_token_wise else 0)
    config = MethodConfig(name=golden.meta["method"], queue_size=64, **options)
    method = kind(encoder, config)
    if hasattr(method, "simclr_head"):
        method.simclr_head = SimClrHead(encoder.visual.feature_dim, out_dim=spec["predictor_sim.linear3.bias"][1][0])
    missing, unexpected = method.load_state_dict(from_original(golden_state(golden)), strict=False)
    # The original allocates a masked-language head for FILIP and never uses it.
    assert all(name.startswith("mlm_head") for name in unexpected), unexpected
    assert all("queue" in name or "num_batches_tracked" in name for name in missing), missing
    if hasattr(method, "queue"):
        method.queue.rows.copy_(torch.from_numpy(golden.arrays["bank_before"]).T)
    return method.train()


def golden_batch(golden: Golden, rank: int = 0, num_ranks: int = 1) -> Batch:
    """Take one rank's rows of the recording, `num_ranks` ranks sharing them."""
    shape, seed = golden.meta["images"]["shape"], golden.meta["seed"]
    images = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    assert (
        images.sum(dtype=np.float64) == np.float64(golden.meta["images"]["sum"])
        or abs(images.sum() - golden.meta["images"]["sum"]) < 0.05
    )
    views = torch.from_numpy(images).unflatten(1, (-1, 3))  # (N, V, 3, S, S)
    arrays = golden.arrays
    names = sorted(key for key in arrays if key.startswith("tokens"))
    tokens = torch.stack([torch.from_numpy(arrays[key]).long() for key in names], dim=1)
    labels = torch.from_numpy(arrays["labels0"]).long() if "labels0" in arrays else torch.full_like(tokens[:, 0], -100)
    per_rank = len(views) // num_ranks
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    return Batch(
        images=views[own],
        tokens=original_ids(tokens)[own],
        mlm_labels=original_ids(labels)[own],
        pair_indices=torch.arange(len(views))[own],
    )


def our_gradients(method: Method, golden: Golden) -> dict[str, Tensor]:
    """Collect our gradients by our names."""
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
