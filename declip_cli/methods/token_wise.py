"""What FILIP and DeFILIP share: the token-wise loss and its own logit scale."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from declip_cli.batch import Embeddings
from declip_cli.config import MethodConfig
from declip_cli.methods.base import Method
from declip_cli.methods.terms import token_wise_loss
from declip_cli.model.clip import INITIAL_LOGIT_SCALE, DualEncoder, text_token_mask, unit
from declip_cli.model.vision_transformer import ImageStates


class TokenWise(Method):
    """A method with the term `filip`: one view of the image and one text, compared token by token."""

    options: ClassVar[frozenset[str]] = Method.options | {"token_wise_top_k", "score_padding"}
    is_token_wise: ClassVar[bool] = True

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        self.logit_scale_dense = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def token_fields(self, image: ImageStates, states: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Map one view of the image and one text into the token-wise space.

        Args:
            image: of the view.
            states: token states of the text, (B, L, E).
            tokens: its ids, int64, (B, L).

        Returns:
            Fields of `Embeddings`: `image_tokens` (B, P, Q), `text_tokens` (B, L, Q), `text_token_mask` (B, L), which
            counts padding too with `score_padding`.
        """
        everything = torch.ones_like(tokens, dtype=torch.bool)
        return {
            "image_tokens": self.encoder.map_patches(image.patches),
            "text_tokens": self.encoder.map_tokens(states),
            "text_token_mask": everything if self.config.score_padding else text_token_mask(tokens),
        }

    def filip_term(self, embeddings: Embeddings) -> Tensor:
        """Match images with their texts by their tokens, in nats, ().

        The dense logit scale is never capped in forward (`prototype/model/filip.py`).
        """
        return token_wise_loss(
            unit(embeddings.image_tokens),
            unit(embeddings.text_tokens),
            embeddings.text_token_mask,
            scale=self.logit_scale_dense.exp(),
            top_k=self.config.token_wise_top_k,
            label_smoothing=self.config.label_smoothing,
        )

    def logit_scale_in_use(self) -> nn.Parameter:
        """Return the dense logit scale where the token-wise loss weighs most, ()."""
        others = max(self.weights.get(name, 0.0) for name in ("clip", "nn"))
        return self.logit_scale_dense if self.weights["filip"] > others else self.encoder.logit_scale
