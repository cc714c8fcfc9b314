"""OpenAI's modified ResNet: pixels → image features and a map of patch states."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip_cli.model.batch_norm import FullBatchNorm
from declip_cli.model.vision_transformer import ImageStates

_EXPANSION = 4
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FullBatchNorm)


class Bottleneck(nn.Module):
    """Residual block whose stride is an average pool, so that no pixel is skipped."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        out_channels = channels * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool: nn.Module = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out_channels)),
                    ]
                )
            )
        # A block starts as the identity (OpenAI's CLIP.initialize_parameters).
        nn.init.zeros_(self.bn3.weight)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine feature maps, (B, C, h, w) → (B, C', h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(maps)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(maps))


def _recomputation_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed block's first run and of its second, in backward."""
    return nullcontext(), _unchanged_norms(block)


@contextmanager
def _unchanged_norms(block: nn.Module) -> Iterator[None]:
    """Leave running statistics alone, so that a batch counts once."""
    norms = [module for module in block.modules() if isinstance(module, _NORMS)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros((), dtype=torch.int64, device=norm.weight.device)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class AttentionPool(nn.Module):
    """Sum a feature map up by attention: its mean asks, its positions answer."""

    def __init__(self, map_side: int, width: int, *, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(map_side**2 + 1, width) * width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, maps: Tensor) -> Tensor:
        """Pool and project, (B, E, h, w) → (B, D)."""
        positions = maps.flatten(2).transpose(1, 2)  # (B, P, E)
        tokens = torch.cat([positions.mean(1, keepdim=True), positions], dim=1)  # (B, 1 + P, E)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        batch, length, width = tokens.shape
        shape = (batch, -1, self.num_heads, width // self.num_heads)
        q = self.q_proj(tokens[:, :1]).view(shape).transpose(1, 2)  # (B, H, 1, E/H)
        k = self.k_proj(tokens).view(shape).transpose(1, 2)  # (B, H, 1 + P, E/H)
        v = self.v_proj(tokens).view(shape).transpose(1, 2)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)  # (B, H, 1, 1 + P)
        pooled: Tensor = self.c_proj((weights @ v).transpose(1, 2).reshape(batch, width))
        return pooled


def normalize_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn bytes into zero mean and unit variance.

    Args:
        images: uint8 RGB, (B, S, S, 3); float images, (B, 3, S, S), count as normalized.
        mean: of each channel, in [0, 1], (3,).
        std: of each channel, in [0, 1], (3,).

    Returns:
        Float32, (B, 3, S, S), with channels last in memory as the bytes had them: convolutions are faster so.
    """
    if images.is_floating_point():
        return images
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std)).permute(0, 3, 1, 2)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, average-pool strides, attention pool.

    Args:
        image_side_px: S, a multiple of 32.
        num_blocks: blocks of the four stages.
        width: channels of the first stage; E is 32 times this.
        num_heads: H of the attention pool.
        embed_dim: D.
    """

    is_batch_dependent = True

    def __init__(
        self, *, image_side_px: int, num_blocks: tuple[int, ...], width: int, num_heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.feature_dim = width * 8 * _EXPANSION
        self.gradient_checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels_in = width
        for stage, count in enumerate(num_blocks):
            channels = width * 2**stage
            blocks = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Bottleneck(channels_in, channels, stride=stride))
                channels_in = channels * _EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(image_side_px // 32, self.feature_dim, num_heads=num_heads, embed_dim=embed_dim)

    def forward(self, images: Tensor, mean: Tensor, std: Tensor) -> ImageStates:
        """Describe images.

        Args:
            images: as in `normalize_images`.
            mean: of each channel, in [0, 1], (3,).
            std: of each channel, in [0, 1], (3,).

        Returns:
            The mean of the last feature map, (B, E), and its positions as patches, (B, P, E).
        """
        maps = normalize_images(images, mean, std)
        for number in (1, 2, 3):
            maps = F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(maps)))
        maps = self.avgpool(maps)
        for stage in (1, 2, 3, 4):
            for block in getattr(self, f"layer{stage}"):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    contexts = partial(_recomputation_contexts, block)
                    maps = checkpoint(block, maps, use_reentrant=False, context_fn=contexts)
                else:
                    maps = block(maps)
        patches = maps.flatten(2).transpose(1, 2)  # (B, P, E)
        return ImageStates(features=patches.mean(1), patches=patches)

    def project(self, patches: Tensor) -> Tensor:
        """Pool positions into the shared embedding, (B, P, E) → (B, D)."""
        side = int(patches.shape[1] ** 0.5)
        maps = patches.transpose(1, 2).unflatten(2, (side, side))
        pooled: Tensor = self.attnpool(maps)
        return pooled
