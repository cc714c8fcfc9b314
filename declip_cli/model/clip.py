"""The dual encoder: an image tower, a text tower and the scale of their cosines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.model.dims import Architecture, VitDims
from declip_cli.model.heads import TokenWiseHeads
from declip_cli.model.preprocessing import IMAGE_MEAN, IMAGE_STD
from declip_cli.model.resnet import ModifiedResNet, normalize_images
from declip_cli.model.text_transformer import END_ID, TextTransformer
from declip_cli.model.transformer import Transformer
from declip_cli.model.vision_transformer import ImageStates, VisionTransformer

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Logarithm of every logit scale before training (CLIP, arXiv 2103.00020, section 2.5)."""


class Encoder(nn.Module):
    """Map images and texts into one space, by whatever towers."""

    logit_scale: nn.Parameter
    """Logarithm of the scale of the cosines."""
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(IMAGE_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGE_STD), persistent=False)

    def set_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalize pixels from now on by the mean and the deviation of each channel, in [0, 1]."""
        self.pixel_mean.copy_(torch.tensor(mean))
        self.pixel_std.copy_(torch.tensor(std))

    def normalize_images(self, images: Tensor) -> Tensor:
        """Normalize images as the towers do: uint8 RGB, (B, S, S, 3) → float32, (B, 3, S, S)."""
        return normalize_images(images, self.pixel_mean, self.pixel_std)

    def encode_image(self, images: Tensor, *, projected: bool = True) -> Tensor:
        """Embed images.

        Args:
            images: uint8 RGB, (B, S, S, 3).
            projected: whether to map into the shared embedding; else the features before it.

        Returns:
            Not normalized, (B, D), or (B, E) before the projection.
        """
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: ids, int64, (B, L).

        Returns:
            Not normalized, (B, D).
        """
        raise NotImplementedError


class DualEncoder(Encoder):
    """Map images and texts into one space by towers of CLIP's.

    Images arrive as uint8 and are cast, scaled and normalized in the image tower and nowhere else.

    Args:
        architecture: the dimensions.
        token_wise_dim: width of token-wise features; 0 for models that compare whole images and texts.
    """

    def __init__(self, architecture: Architecture, *, token_wise_dim: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        self.visual = _build_vision(architecture)
        self.text = TextTransformer(architecture.text, embed_dim=architecture.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None = None
        """Added to the scaled cosines by the sigmoid loss (SigLIP, arXiv 2303.15343), ()."""
        self.token_wise: TokenWiseHeads | None = None
        if token_wise_dim:
            self.token_wise = TokenWiseHeads(self.visual.feature_dim, self.text.feature_dim, width=token_wise_dim)

    def add_logit_bias(self) -> None:
        """Have the bias of the sigmoid loss, 0 for now."""
        self.logit_bias = nn.Parameter(torch.zeros_like(self.logit_scale))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002  (torch's own)
        """Load a state, with the bias of the sigmoid loss where it has one."""
        if "logit_bias" in state_dict and self.logit_bias is None:
            self.add_logit_bias()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def image_states(self, images: Tensor, kept: Tensor | None = None) -> ImageStates:
        """Run the image tower up to its features and patches.

        Args:
            images: uint8 RGB, (B, S, S, 3); float images, (B, 3, S, S), count as normalized.
            kept: places of the patches that a vision transformer sees, int64, (B, K); None: all.
        """
        chosen = () if kept is None else (kept,)
        states: ImageStates = self.visual(images, self.pixel_mean, self.pixel_std, *chosen)
        return states

    def project_image(self, states: ImageStates) -> Tensor:
        """Map an image tower's output into the shared embedding, → (B, D)."""
        is_vit = isinstance(self.visual, VisionTransformer)
        return self.visual.project(states.features if is_vit else states.patches)

    def encode_image(self, images: Tensor, *, projected: bool = True) -> Tensor:
        """Embed images, as in `Encoder`."""
        states = self.image_states(images)
        return self.project_image(states) if projected else states.features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed texts, as in `Encoder`."""
        return self.text.project(self.text.pool_at_end(self.text(tokens), tokens))

    def encode_image_tokens(self, images: Tensor) -> Tensor:
        """Embed each patch for token-wise comparison, (B, S, S, 3) → (B, P, Q), not normalized."""
        return self.map_patches(self.image_states(images).patches)

    def encode_text_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed each token for token-wise comparison.

        Args:
            tokens: ids, int64, (B, L).

        Returns:
            Not normalized, (B, L, Q), and True where a token is part of the text, (B, L).
        """
        return self.map_tokens(self.text(tokens)), text_token_mask(tokens)

    def map_patches(self, patches: Tensor) -> Tensor:
        """Map patch states into the token-wise space, (B, P, E) → (B, P, Q)."""
        out: Tensor = self._heads().image_mapping(patches)
        return out

    def map_tokens(self, states: Tensor) -> Tensor:
        """Map token states into the token-wise space, (B, L, E) → (B, L, Q)."""
        out: Tensor = self._heads().text_mapping(states)
        return out

    def _heads(self) -> TokenWiseHeads:
        if self.token_wise is None:
            raise ValueError("this model compares whole images and texts: it has no token-wise heads")
        return self.token_wise

    def set_gradient_checkpointing(self, is_on: bool) -> None:
        """Choose whether blocks are computed again in backward instead of kept."""
        for tower in (self.visual, self.text):
            for module in tower.modules():
                if isinstance(module, Transformer | ModifiedResNet):
                    module.gradient_checkpointing = is_on


class WholeTokenizer(Protocol):
    """Of a model whose text tower takes texts of the whole context length only."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Turn N texts into ids, int64, (N, L)."""

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the context."""


def text_token_mask(tokens: Tensor) -> Tensor:
    """Tell a text's tokens from its padding; id 0 is also a "!", so only the end token can say.

    Args:
        tokens: ids, int64, (B, L).

    Returns:
        True up to and including each text's first end token, bool, (B, L).
    """
    is_end = tokens == END_ID
    return is_end.cumsum(1) - is_end.long() == 0


def normalize(embeds: Tensor) -> Tensor:
    """Scale the last dimension to unit length, in float32."""
    return F.normalize(embeds.float(), dim=-1)


def _build_vision(architecture: Architecture) -> VisionTransformer | ModifiedResNet:
    dims = architecture.vision
    if isinstance(dims, VitDims):
        return VisionTransformer(dims, image_side_px=architecture.image_side_px, embed_dim=architecture.embed_dim)
    return ModifiedResNet(
        image_side_px=architecture.image_side_px,
        num_blocks=dims.num_blocks,
        width=dims.width,
        num_heads=dims.num_heads,
        embed_dim=architecture.embed_dim,
    )
