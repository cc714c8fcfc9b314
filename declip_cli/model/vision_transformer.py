"""The vision transformer: pixels → image features and patch states."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.model.dims import VitDims
from declip_cli.model.transformer import LayerNorm, ResidualAttentionBlock, Transformer, working_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStates:
    """What an image tower gives: one vector per image, and one per patch."""

    features: Tensor
    """Before the projection into the shared embedding, (B, E)."""
    patches: Tensor
    """(B, P, E)."""


class VisionTransformer(nn.Module):
    """CLIP's vision transformer with OpenAI's parameter names.

    Args:
        dims: of the tower, whose width is E.
        image_side_px: S, a multiple of the side of a patch.
        embed_dim: D.
    """

    is_batch_dependent = False
    """Whether an image's features depend on the others in the batch (BatchNorm)."""

    def __init__(self, dims: VitDims, *, image_side_px: int, embed_dim: int) -> None:
        super().__init__()
        width, patch_side_px = dims.width, dims.patch_side_px
        self.patch_side_px = patch_side_px
        self.feature_dim = width
        num_patches = (image_side_px // patch_side_px) ** 2
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_side_px, stride=patch_side_px, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(num_patches + 1, width))
        self.ln_pre = LayerNorm(width, eps=dims.norm_eps) if dims.has_pre_norm else nn.Identity()
        self.transformer = Transformer(
            width,
            dims.num_layers,
            num_heads=dims.num_heads,
            is_causal=False,
            quick_gelu=dims.quick_gelu,
            mlp_width=dims.mlp_width,
            norm_eps=dims.norm_eps,
        )
        self.ln_post = LayerNorm(width, eps=dims.norm_eps)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor, mean: Tensor, std: Tensor, kept: Tensor | None = None) -> ImageStates:
        """Describe images.

        Args:
            images: uint8 RGB, (B, S, S, 3); float images, (B, 3, S, S), count as normalized.
            mean: of each channel, in [0, 1], (3,).
            std: of each channel, in [0, 1], (3,).
            kept: places of the patches that are seen, int64, (B, K); None: all P.

        Returns:
            Features after the last layer norm, patch states before it (as the original's FILIP reads them).
        """
        states = self.transformer(self.ln_pre(self._embed(images, mean, std, kept)))
        return ImageStates(features=self.ln_post(states[:, 0]), patches=states[:, 1:])

    def attend(self, images: Tensor, mean: Tensor, std: Tensor) -> tuple[ImageStates, Tensor]:
        """Describe images, and say how much the class token attends to each patch.

        Args:
            images: as in `forward`, like `mean` and `std`.
            mean: of each channel.
            std: of each channel.

        Returns:
            What `forward` returns; and the attention, the mean over heads and layers, float32, (B, P).
        """
        states, rows = self.ln_pre(self._embed(images, mean, std)), []
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            rows.append(block.attn.first_row(block.ln_1(states))[:, 1:])
            states = block(states, False)
        described = ImageStates(features=self.ln_post(states[:, 0]), patches=states[:, 1:])
        return described, torch.stack(rows).mean(0)

    def _embed(self, images: Tensor, mean: Tensor, std: Tensor, kept: Tensor | None = None) -> Tensor:
        """Make the states of the class token and the patches, with their positions, (B, 1 + P, E), or (B, 1 + K, E)."""
        states = self._embed_patches(images, mean, std)  # (B, P, E)
        # `shape` rather than `len`, here and in the text tower: an exporter would take a length for a constant.
        first = self.class_embedding.to(states.dtype).expand(states.shape[0], 1, -1)
        states = torch.cat([first, states], dim=1) + self.positional_embedding.to(states.dtype)  # (B, 1 + P, E)
        if kept is None:
            return states
        places = F.pad(kept + 1, (1, 0))  # (B, 1 + K); the class token stands first
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))

    def _embed_patches(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is a linear layer on cut-out patches; as such its
        # backward pass is eleven times as fast in bfloat16 on CPUs.
        patch, weight = self.patch_side_px, self.conv1.weight  # (E, 3, patch, patch)
        if images.is_floating_point():
            return F.linear(_cut(images, patch), weight.flatten(1))
        # Bytes are cut as bytes and become numbers in [-1, 1), exact in every number format; the weight and a bias
        # do the normalization: (byte / 255 - mean) / std = number · 128 / (255 std) + (128 / 255 - mean) / std.
        numbers = _cut(images.permute(0, 3, 1, 2), patch)  # (B, P, 3·patch²)
        minus_one = torch.full((), -1.0, dtype=working_dtype(weight), device=weight.device)
        numbers = torch.add(minus_one, numbers, alpha=1 / 128)
        scale, shift = 128 / (255 * std), (128 / 255 - mean) / std
        bias = (weight.sum((2, 3)) * shift).sum(1)  # (E,)
        return F.linear(numbers, (weight * scale[:, None, None]).flatten(1), bias)

    def project(self, features: Tensor) -> Tensor:
        """Map features into the shared embedding, (B, E) → (B, D)."""
        return features @ self.proj


def _cut(images: Tensor, side: int) -> Tensor:
    """Cut images into square patches, (B, 3, S, S) → (B, P, 3·side²)."""
    grid = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, S / side, side, S / side, side)
    patches: Tensor = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches
