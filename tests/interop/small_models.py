"""Small models with random weights, and images in files, for comparisons with other projects."""

import io

import numpy as np
import torch
from PIL import Image

from declip_cli.model.architectures import Architecture, ResNetDims, TextDims, VitDims
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import DualEncoder
from declip_cli.model.preprocessing import Preprocessing

VIT = VitDims(patch_side_px=8, width=24, num_layers=2, num_heads=3)
RESNET = ResNetDims(num_blocks=(1, 1, 1, 1), width=8, num_heads=4)
TEXT = TextDims(context_length=12, width=16, num_layers=2, num_heads=2)


def model_of(vision=VIT, text=TEXT, *, side=32, embed_dim=12, method="clip", seed=0, **preprocessing):
    """Build a model; its weights, biases too, are random, and its statistics no defaults."""
    torch.manual_seed(seed)
    architecture = Architecture(image_side_px=side, embed_dim=embed_dim, vision=vision, text=text)
    encoder = DualEncoder(architecture, token_wise_dim=10 if method in ("filip", "defilip") else 0).eval()
    with torch.no_grad():
        for value in encoder.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
    how = Preprocessing(**{"image_side_px": side, "resize_px": side, "mean": (0.4, 0.5, 0.45), **preprocessing})
    encoder.set_pixels(how.mean, how.std)
    return PretrainedModel(
        encoder=encoder,
        name="random",
        method=method,
        arch="small",
        token_wise=method == "filip",
        preprocessing=how,
        context_length=text.context_length,
        fingerprint="",
    )


def image_file(seed=0, *, width=300, height=260):
    """Draw a smooth random image, as the bytes of a JPEG file."""
    few = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


SHAPES = ((300, 260), (260, 301), (97, 41), (30, 64), (500, 223))
"""Widths and heights: larger and smaller than the model's image, odd differences, an upright one."""
