"""Pairs of noise with captions of realistic lengths, and the number format of a step, for its benchmarks."""

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor

from declip_cli.batch import Batch
from declip_cli.methods.base import Method


def draw_lengths(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    """Draw caption lengths in tokens: `normal`, 16 ± 8; or `heavy`, log-normal as web captions, a few of them cut."""
    noise = torch.randn(shape, generator=generator)
    return (noise * 8 + 16 if kind == "normal" else (noise * 0.65 + 2.8).exp()).long()


def make_batch(method: Method, options: argparse.Namespace, device: torch.device) -> Batch:
    """Draw pairs of noise with captions of realistic lengths, cut to the longest."""
    size = options.batch_size
    generator = torch.Generator().manual_seed(0)
    views, architecture = method.views, method.encoder.architecture
    side, context = architecture.image_side_px, architecture.text.context_length
    shape = (size, len(views.images), side, side, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49000, (size, len(views.texts), context), generator=generator)
    lengths = draw_lengths((size, len(views.texts)), options.captions, generator).clamp(4, context)
    position = torch.arange(context)
    tokens = tokens.masked_fill(position == 0, 49406).masked_fill(position == lengths[..., None] - 1, 49407)
    tokens = tokens.masked_fill(position >= lengths[..., None], 0)
    longest = context if views.pad_to_context else int(lengths.max())
    labels = torch.full((size, context), -100)
    if "masked" in views.texts:
        is_masked = (torch.rand(size, context, generator=generator) < 0.15) & (position < lengths[:, :1] - 1)
        labels = torch.where(is_masked & (position > 0), tokens[:, 0], labels)
    batch = Batch(
        images=images, tokens=tokens[..., :longest], mlm_labels=labels[:, :longest], pair_indices=torch.arange(size)
    )
    return (batch if options.ungrouped else batch.counted()).to(device)


def autocast(precision: str, device: torch.device):
    return lambda: torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
