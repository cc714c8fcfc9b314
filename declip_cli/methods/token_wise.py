"""What FILIP and DeFILIP share: the token-wise loss and its own logit scale."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.batch import Embeddings
from declip_cli.config import MethodConfig
from declip_cli.contrastive_losses import find_positives
from declip_cli.distributed import Gathered, gather
from declip_cli.methods.base import Method
from declip_cli.model.clip import INITIAL_LOGIT_SCALE, DualEncoder, normalize, text_token_mask
from declip_cli.model.vision_transformer import ImageStates
from declip_cli.token_wise_losses import most_relevant_tokens, token_wise_similarity


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
            normalize(embeddings.image_tokens),
            normalize(embeddings.text_tokens),
            embeddings.text_token_mask,
            self.ids(embeddings),
            scale=self.logit_scale_dense.exp(),
            top_k=self.config.token_wise_top_k,
            label_smoothing=self.config.label_smoothing,
        )

    def logit_scale_in_use(self) -> nn.Parameter:
        """Return the dense logit scale where the token-wise loss weighs most, ()."""
        others = max(self.weights.get(name, 0.0) for name in ("clip", "nn"))
        return self.logit_scale_dense if self.weights["filip"] > others else self.encoder.logit_scale


def token_wise_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    ids: Gathered,
    *,
    scale: Tensor,
    top_k: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Distinguish pairs by their best-matching tokens, in both directions.

    Args:
        image_tokens: unit length, (B, P, Q).
        text_tokens: unit length, (B, L, Q).
        text_mask: True where a text token counts, bool, (B, L); every patch counts.
        ids: identities of the pairs, int64, (B, I); the target is spread evenly over those that share one.
        scale: exponentiated dense logit scale, ().
        top_k: tokens of each image and text that are gathered and compared with.
        label_smoothing: in [0, 1].

    Returns:
        Mean over both directions, in nats, ().

    Source: FILIP, arXiv 2111.07783, section 3.2; prototype/model/filip.py.
    """
    images = (image_tokens, torch.ones_like(image_tokens[..., 0], dtype=torch.bool))
    texts = (text_tokens, text_mask)
    positives = find_positives(ids.own, ids.all).to(scale.dtype)  # (B, M)
    targets = positives / positives.sum(1, keepdim=True)
    losses = []
    for (query, query_mask), (key, key_mask) in ((images, texts), (texts, images)):
        kept = most_relevant_tokens(key, query, mask=key_mask, partner_mask=query_mask, top_k=top_k)  # (B, K, Q)
        similarity = token_wise_similarity(query, gather(kept), query_mask=query_mask)  # (B, M)
        losses.append(F.cross_entropy(scale * similarity, targets, label_smoothing=label_smoothing))
    return torch.stack(losses).mean()
