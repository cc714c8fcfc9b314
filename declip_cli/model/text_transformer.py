"""The text transformer: token ids → text features and per-token states."""

import torch
from torch import Tensor, nn

from declip_cli.model.dims import TextDims
from declip_cli.model.transformer import LayerNorm, Transformer, working_dtype

END_ID = 49407
"""Id of the end-of-text token, at whose position a text is read off; equal to the tokenizer's."""
VOCABULARY_SIZE = 49409
"""OpenAI's 49,408 ids and the mask token after them."""


class TextTransformer(nn.Module):
    """CLIP's causal text transformer with OpenAI's parameter names.

    Args:
        dims: of the tower: its context length is the largest L, its width E.
        embed_dim: D.

    Source: Sense-GVT/DeCLIP, prototype/model/text_encoder/text_transformer.py; unlike OpenAI's, the
        projection has a bias.
    """

    def __init__(self, dims: TextDims, *, embed_dim: int) -> None:
        super().__init__()
        width = dims.width
        self.context_length = dims.context_length
        self.feature_dim = width
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(dims.context_length, width))
        self.transformer = Transformer(
            width,
            dims.num_layers,
            num_heads=dims.num_heads,
            is_causal=True,
            quick_gelu=dims.quick_gelu,
            mlp_width=dims.mlp_width,
            norm_eps=dims.norm_eps,
        )
        self.ln_final = LayerNorm(width, eps=dims.norm_eps)
        self.text_projection = nn.Linear(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        nn.init.zeros_(self.text_projection.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read texts token by token.

        Args:
            tokens: ids, int64, (B, L) with L at most the context length.

        Returns:
            State of each token after the last layer norm, (B, L, E).
        """
        return self.contextualize(self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up tokens and add their positions, (B, L) → (B, L, E)."""
        states: Tensor = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return states

    def contextualize(self, states: Tensor) -> Tensor:
        """Let embedded tokens see those before them, (B, L, E) → (B, L, E)."""
        # Autocast leaves embeddings alone; without this the residual stream would stay in float32.
        out: Tensor = self.ln_final(self.transformer(states.to(working_dtype(states))))
        return out

    def pool_at_end(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Take the state at each text's first end-of-text token, (B, L, E) and (B, L) → (B, E)."""
        ends = (tokens == END_ID).int().argmax(1)
        return states[torch.arange(tokens.shape[0], device=tokens.device), ends]

    def project(self, features: Tensor) -> Tensor:
        """Map features into the shared embedding, (B, E) → (B, D)."""
        out: Tensor = self.text_projection(features)
        return out
