"""DeFILIP: DeCLIP's supervision and FILIP's token-wise loss together (arXiv 2203.05796)."""

from typing import ClassVar

import torch
from torch import nn

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import MethodConfig, Views
from declip_cli.methods.base import embeddings_of
from declip_cli.methods.declip import DeClip
from declip_cli.methods.terms import token_wise
from declip_cli.model.clip import DualEncoder, unit


class DeFilip(DeClip):
    """The token-wise loss is on the first picture and the first text only, as in the original."""

    default_weights: ClassVar[dict[str, float]] = DeClip.default_weights | {"filip": 0.2}
    options: ClassVar[frozenset[str]] = DeClip.options | {"token_wise_top_k"}
    is_token_wise: ClassVar[bool] = True

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        self.logit_scale_dense = nn.Parameter(torch.tensor(2.6593))

    @property
    def views(self) -> Views:
        """DeCLIP's; the original scores padding tokens too."""
        views = super().views
        return Views(images=views.images, texts=views.texts, pad_to_context=self.config.faithful)

    def embed(self, batch: Batch) -> Embeddings:
        """Run both towers on all views; map the first ones token by token."""
        image_views = self.image_views(batch.images)
        states = self.text_views(batch.tokens)  # (B, T, L, E)
        losses, counts = self.mask_losses(states[:, 0], batch.mask_labels)
        return embeddings_of(
            self.project_images(image_views),
            self.project_texts(states, batch.tokens),
            mask_losses=losses,
            mask_counts=counts,
            image_tokens=self.encoder.map_patches(image_views[0].patches),
            text_tokens=self.encoder.map_tokens(states[:, 0]),
            text_token_mask=batch.tokens[:, 0] != 0,
        )

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Add the token-wise loss to DeCLIP's terms."""
        terms = self.declip_terms(embeddings)
        if self.has("filip"):
            terms["filip"] = token_wise(
                unit(embeddings.image_tokens),
                unit(embeddings.text_tokens),
                None if self.config.faithful else embeddings.text_token_mask,
                scale=self.logit_scale_dense.exp(),
                top_k=self.config.token_wise_top_k,
                label_smoothing=self.config.label_smoothing,
            )
        return self.weigh(terms)
