"""FILIP: pictures and texts compared token by token (arXiv 2111.07783)."""

from typing import ClassVar

import torch
from torch import nn

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import MethodConfig, Views
from declip_cli.methods.base import Method, embeddings_of
from declip_cli.methods.terms import PAIRS, contrastive_pairs, token_wise
from declip_cli.model.clip import DualEncoder, unit


class Filip(Method):
    """Late interaction on the most relevant tokens."""

    default_weights: ClassVar[dict[str, float]] = {"filip": 1.0, "clip": 0.0}
    options: ClassVar[frozenset[str]] = Method.options | {"token_wise_top_k"}
    is_token_wise: ClassVar[bool] = True

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        self.logit_scale_dense = nn.Parameter(torch.tensor(2.6593))

    @property
    def views(self) -> Views:
        """One strong view; the original feeds the masked caption and scores its padding."""
        if self.config.faithful:
            return Views(images=("augmented",), texts=("masked",), pad_to_context=True)
        return Views(images=("augmented",), texts=("plain",))

    def embed(self, batch: Batch) -> Embeddings:
        """Map patches and tokens into the token-wise space."""
        views = self.image_views(batch.images[:, :1])
        states = self.text_views(batch.tokens[:, :1])  # (B, 1, L, E)
        return embeddings_of(
            self.project_images(views),
            self.project_texts(states, batch.tokens[:, :1]),
            image_tokens=self.encoder.map_patches(views[0].patches),
            text_tokens=self.encoder.map_tokens(states[:, 0]),
            text_token_mask=batch.tokens[:, 0] != 0,
        )

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Tell pairs apart by their tokens, and by their whole embeddings if weighted."""
        terms = {}
        if self.has("filip"):
            terms["filip"] = token_wise(
                unit(embeddings.image_tokens),
                unit(embeddings.text_tokens),
                None if self.config.faithful else embeddings.text_token_mask,
                scale=self.logit_scale_dense.exp(),
                top_k=self.config.token_wise_top_k,
                label_smoothing=self.config.label_smoothing,
            )
        if self.has("clip"):
            images, texts = unit(embeddings.images), unit(embeddings.texts)
            scale = self.encoder.logit_scale.exp()  # the original's FILIP has no cap at 100
            smoothing = self.config.label_smoothing
            losses = contrastive_pairs(images, texts, pairs=PAIRS[1], scale=scale, label_smoothing=smoothing)
            terms["clip"] = losses.mean()
        return self.weigh(terms)
