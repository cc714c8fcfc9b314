"""SLIP: CLIP on one view, SimCLR on two others of the same image (arXiv 2112.12750)."""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import ImageView, MethodConfig, TextView, Views
from declip_cli.methods.base import Method, Term, embeddings_of
from declip_cli.methods.terms import simclr_loss
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import SimClrHead


class Slip(Method):
    """Self-supervision of images beside the supervision by language."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0, "simclr": 1.0}
    options: ClassVar[frozenset[str]] = Method.options | {"head_width", "simclr_temperature"}

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        if self.is_active("simclr"):
            self.simclr_head = SimClrHead(encoder.visual.feature_dim, width=config.head_width)

    @property
    def views(self) -> Views:
        """One mild view for CLIP, two strong ones for SimCLR; the captions themselves."""
        images: tuple[ImageView, ...] = ("plain", "augmented", "augmented") if self.is_active("simclr") else ("plain",)
        texts: tuple[TextView, ...] = ("plain",)
        return Views(images=images, texts=texts * self.config.captions)

    def embed(self, batch: Batch) -> Embeddings:
        """Project the first view; keep the features of the others."""
        plain, *strong = self.encode_images(batch.images)
        features = {"image_features": torch.stack([view.features for view in strong], dim=1)} if strong else {}
        return embeddings_of(
            batch,
            images=self.project_images([plain]),  # (B, 1, D)
            texts=self.project_texts(self.encode_texts(batch), batch.tokens),  # (B, T, D)
            **features,  # (B, 2, E)
            **self.word_fields(plain, batch),
        )

    def terms(self) -> dict[str, Term]:
        """Match images with their texts, and views of an image with each other."""
        return {"clip": partial(self.clip_term, num_texts=self.config.captions), "simclr": self.simclr_term}

    def simclr_term(self, embeddings: Embeddings) -> Tensor:
        """Distinguish the other view of an image from all views of all images, in nats, ()."""
        return simclr_loss(embeddings.image_features, self.simclr_head, temperature=self.config.simclr_temperature)
