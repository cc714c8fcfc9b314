"""CLIP:rocket: weak and strong views of images and texts, each matched in a space of its own (arXiv 2305.08675)."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import MethodConfig, Views
from declip_cli.distributed import Gathered
from declip_cli.methods.base import Method, Term, embeddings_of
from declip_cli.methods.terms import contrastive_loss
from declip_cli.model.clip import DualEncoder, normalize
from declip_cli.model.heads import SimClrHead

INITIAL_STRONG_LOGIT_SCALE = math.log(1 / 0.1)
"""Logarithm of the strong views' logit scale before training."""


class Rocket(Method):
    """The weak views train the encoder's own projections, which are saved; the strong ones heads of training only."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1 / 3, "strong": 2 / 3}
    options: ClassVar[frozenset[str]] = Method.options | {"head_width", "strong_label_smoothing"}

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        if self.is_active("strong"):
            self.logit_scale_strong = nn.Parameter(torch.tensor(INITIAL_STRONG_LOGIT_SCALE))
            self.image_head = SimClrHead(encoder.visual.feature_dim, width=config.head_width)
            self.text_head = SimClrHead(encoder.text.feature_dim, width=config.head_width)

    @property
    def views(self) -> Views:
        """One weak and two strong views of the image, and of the text."""
        if not self.is_active("strong"):
            return Views(images=("plain",), texts=("keywords",))
        return Views(
            images=("plain", "augmented", "augmented"),
            texts=("keywords", "augmented_keywords", "augmented_keywords"),
        )

    def embed(self, batch: Batch) -> Embeddings:
        """Project the weak views; keep the features of the strong ones."""
        weak, *strong = self.encode_images(batch.images)
        texts = self.pool_texts(self.encode_texts(batch), batch.tokens)  # (B, T, E)
        features = {"text_features": texts[:, 1:]}  # (B, 2, E)
        if strong:
            features["image_features"] = torch.stack([view.features for view in strong], dim=1)  # (B, 2, E)
        return embeddings_of(
            batch,
            images=self.project_images([weak]),  # (B, 1, D)
            texts=self.encoder.text.project(texts[:, :1]),  # (B, 1, D)
            **features,
            **self.word_fields(weak, batch),
        )

    def terms(self) -> dict[str, Term]:
        """Match weak with weak views, and strong with strong ones."""
        return {"clip": self.clip_term, "strong": self.strong_term}

    def strong_term(self, embeddings: Embeddings) -> Tensor:
        """Match both strong views of an image with both of its text, the mean of the four pairs, in nats, ()."""
        images = [self.image_head(embeddings.image_features[:, view]) for view in (0, 1)]  # BatchNorm sees one view
        texts = [self.text_head(embeddings.text_features[:, view]) for view in (0, 1)]
        contrast = replace(
            self.contrast(embeddings),
            scale=self.logit_scale_strong.exp(),
            bias=None,  # always CLIP's softmax: the sigmoid's bias belongs to the space of the weak views
            label_smoothing=self.config.strong_label_smoothing,
        )
        matched = [Gathered(normalize(torch.stack(views, dim=1))) for views in (images, texts)]  # (B, 2, 256) each
        return contrastive_loss(matched[0], matched[1], contrast)

    def logit_scale_in_use(self) -> nn.Parameter:
        """Return the scale of the weak views, which is saved with the model; of the strong ones if only they count."""
        return self.encoder.logit_scale if self.is_active("clip") else self.logit_scale_strong
