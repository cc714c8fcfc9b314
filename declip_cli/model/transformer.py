"""The residual attention block that both towers are made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SLOPE = 1.702
"""Of QuickGELU's sigmoid."""
_COARSE_SUMS = ("cpu",)
"""Where the built-in layer norm sums the gradients of bfloat16 weights in bfloat16: off by half after 10,000 tokens."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the number format of matrix products on a tensor's device: autocast's, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's number format, with statistics in float32.

    Autocast on GPUs would cast input and output to float32 and back: 20 bytes per element instead of 4. Under it
    weight and bias are rounded as those of linear layers are.
    """

    def forward(self, states: Tensor, scale: float = 1.0) -> Tensor:
        """Normalize each token and multiply it by a number, (…, E) → (…, E)."""
        weight, bias = (self.weight * scale, self.bias * scale) if scale != 1 else (self.weight, self.bias)
        device = states.device.type
        if not torch.is_autocast_enabled(device):
            return F.layer_norm(states, self.normalized_shape, weight, bias, self.eps)
        with torch.autocast(device, enabled=False):
            weight, bias = weight.to(states.dtype), bias.to(states.dtype)
            if device in _COARSE_SUMS:
                return torch.addcmul(bias, F.layer_norm(states, self.normalized_shape, eps=self.eps), weight)
            return F.layer_norm(states, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`.

    On CPUs attention is written out: at CLIP's lengths two matrix products and a softmax are two to four times
    as fast as the built-in kernel in bfloat16. Accelerators use the built-in one.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor, is_causal: bool) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            states: (B, L, E).
            is_causal: whether a token sees only itself and those before it.

        Returns:
            Mixed states, (B, L, E).
        """
        batch, length, width = states.shape
        qkv = F.linear(states, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3E)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, L, E/H)
        if states.device.type == "cpu":
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, L, L)
            if is_causal:
                future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            mixed = scores.softmax(-1) @ v  # (B, H, L, E/H)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def first_row(self, states: Tensor) -> Tensor:
        """Say how much the first token attends to each, the mean over heads, float32, (B, L, E) → (B, L)."""
        (query_weight, key_weight, _), (query_bias, key_bias, _) = (
            part.chunk(3) for part in (self.in_proj_weight, self.in_proj_bias)
        )
        query = F.linear(states[:, :1], query_weight, query_bias).unflatten(2, (self.num_heads, -1))  # (B, 1, H, E/H)
        keys = F.linear(states, key_weight, key_bias).unflatten(2, (self.num_heads, -1))  # (B, L, H, E/H)
        scores = (query * keys).float().sum(3) * keys.shape[3] ** -0.5  # (B, L, H)
        row: Tensor = scores.softmax(1).mean(2)
        return row


class Mlp(nn.Module):
    """Two linear layers around a GELU, or around OpenAI's approximation of it, QuickGELU: x·sigmoid(1.702x)."""

    def __init__(self, width: int, hidden_width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden_width)
        self.c_proj = nn.Linear(hidden_width, width)
        self.scale = _SLOPE if quick_gelu else 1.0

    def forward(self, states: Tensor) -> Tensor:
        """Transform each token by itself, (B, L, E) → (B, L, E); `scale` times the states → `scale` times the result.

        1.702 times QuickGELU of x is silu(1.702x): with all states so scaled, the activations, (B, L, 4E), are read
        and written once instead of four times, and no scaled copy of a weight is made.
        """
        if self.scale == 1:
            out: Tensor = self.c_proj(F.gelu(self.c_fc(states)))
            return out
        hidden = F.silu(F.linear(states, self.c_fc.weight, self.c_fc.bias * self.scale))
        return F.linear(hidden, self.c_proj.weight, self.c_proj.bias * self.scale)


class ResidualAttentionBlock(nn.Module):
    """Attention and MLP, each normalized before and added to what came in."""

    def __init__(self, width: int, num_heads: int, *, quick_gelu: bool, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.ln_2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width, quick_gelu=quick_gelu)

    def forward(self, states: Tensor, is_causal: bool) -> Tensor:
        """Refine the tokens of each sequence, (B, L, E) → (B, L, E)."""
        states = states + self.attn(self.ln_1(states), is_causal)
        scale = self.mlp.scale
        return torch.add(states, self.mlp(self.ln_2(states, scale)), alpha=1 / scale)


class Transformer(nn.Module):
    """A stack of residual attention blocks.

    Args:
        width: E.
        num_layers: number of blocks.
        num_heads: H, divides E.
        is_causal: whether tokens see only those before them.
        quick_gelu: OpenAI's approximation of the GELU.
        mlp_width: of the MLPs' hidden layer; None: four times E.
        norm_eps: added to the variance in layer norms.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        *,
        num_heads: int,
        is_causal: bool,
        quick_gelu: bool,
        mlp_width: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.gradient_checkpointing = False
        options: dict[str, Any] = {"quick_gelu": quick_gelu, "mlp_width": mlp_width or 4 * width, "norm_eps": norm_eps}
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads, **options) for _ in range(num_layers))
        self._init_weights(width, num_layers)

    def _init_weights(self, width: int, num_layers: int) -> None:
        # GPT-2's scaling as in OpenAI's CLIP: residual branches start smaller the deeper the stack.
        for block in self.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * num_layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * num_layers) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Refine the tokens of each sequence, (B, L, E) → (B, L, E)."""
        for block in self.resblocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                states = checkpoint(block, states, self.is_causal, use_reentrant=False)
            else:
                states = block(states, self.is_causal)
        return states
