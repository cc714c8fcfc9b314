"""The ways that faster ones have taken the place of, so that `training.py --without NAME` measures each gain alone.

Each function puts one old way back for the rest of the process. None of this is reachable from the package.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.distributed import Gathered
from declip_cli.methods import base, declip, rocket
from declip_cli.methods.terms import Contrast
from declip_cli.model import neighbors, resnet, transformer, vision_transformer
from declip_cli.train import grad_cache


def layer_norm() -> None:
    """Let autocast cast layer norms to float32 and back."""

    def forward(self: nn.LayerNorm, states: Tensor, scale: float = 1.0) -> Tensor:
        weight, bias = (self.weight * scale, self.bias * scale) if scale != 1 else (self.weight, self.bias)
        return F.layer_norm(states, self.normalized_shape, weight, bias, self.eps).to(states.dtype)

    transformer.LayerNorm.forward = forward  # type: ignore[method-assign]


def pixels() -> None:
    """Normalize whole images in float32 and cut the patches afterwards."""

    def embed(self: vision_transformer.VisionTransformer, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if not images.is_floating_point():
            images = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        return F.linear(vision_transformer._cut(images, self.patch_side_px), self.conv1.weight.flatten(1))

    vision_transformer.VisionTransformer._embed_patches = embed  # type: ignore[method-assign]


def quick_gelu() -> None:
    """Scale copies of the weights around SiLU instead of what passes between them."""

    def mlp(self: transformer.Mlp, states: Tensor) -> Tensor:
        if self.scale == 1:
            return self.c_proj(F.gelu(self.c_fc(states)))  # type: ignore[no-any-return]
        slope = 1.702
        hidden = F.silu(F.linear(states, self.c_fc.weight * slope, self.c_fc.bias * slope))
        return F.linear(hidden, self.c_proj.weight / slope, self.c_proj.bias)

    def block(self: transformer.ResidualAttentionBlock, states: Tensor, is_causal: bool) -> Tensor:  # noqa: FBT001
        states = states + self.attn(self.ln_1(states), is_causal)
        return states + self.mlp(self.ln_2(states))  # type: ignore[no-any-return]

    transformer.Mlp.forward = mlp  # type: ignore[method-assign]
    transformer.ResidualAttentionBlock.forward = block  # type: ignore[method-assign]


def channels_last() -> None:
    """Copy images to NCHW before a ResNet."""
    newer = resnet.normalize_images

    def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return newer(images, mean, std).contiguous()

    resnet.normalize_images = normalize


def one_product() -> None:
    """Compare each pair of views by itself, in each direction, and keep the logits for backward; softmax only."""

    def loss(images: Gathered, texts: Gathered, contrast: Contrast, *, is_symmetric: bool = True) -> Tensor:
        rows = torch.arange(len(images.own), device=images.own.device)
        losses = []
        with torch.autocast(images.own.device.type, enabled=False):
            for one in images.own.unbind(1):
                for other in texts.own.unbind(1):
                    for query, key in ((one, other), (other, one))[: 1 + is_symmetric]:
                        logits = contrast.scale.float() * query.float() @ key.float().T
                        losses.append(F.cross_entropy(logits, rows, label_smoothing=contrast.label_smoothing))
        return torch.stack(losses).mean()

    for module in (base, declip, rocket):
        module.contrastive_loss = loss  # type: ignore[attr-defined]


def first_pass() -> None:
    """Embed one micro-batch at a time in GradCache's pass without graph."""
    grad_cache._FIRST_PASS_PARTS = 1


def screening() -> None:
    """Compare the whole queue in float32, which does not wait for the device."""
    neighbors.NeighborQueue._is_screened = lambda self, device: False  # type: ignore[method-assign]


OLD_WAYS: dict[str, Callable[[], None]] = {
    "layer-norm": layer_norm,
    "pixels": pixels,
    "quick-gelu": quick_gelu,
    "channels-last": channels_last,
    "one-product": one_product,
    "first-pass": first_pass,
    "screening": screening,
}
