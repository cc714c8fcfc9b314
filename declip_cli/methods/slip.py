"""SLIP: CLIP on one view, SimCLR on two others of the same image (arXiv 2112.12750)."""

from typing import ClassVar

import torch
from torch import Tensor

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import ImageView, MethodConfig, Views
from declip_cli.distributed import gather, rows_of_rank
from declip_cli.losses import nt_xent
from declip_cli.methods.base import Method, Term, embeddings_of
from declip_cli.model.clip import DualEncoder, unit
from declip_cli.model.heads import SimClrHead


class Slip(Method):
    """Self-supervision of images beside the supervision by language."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0, "simclr": 1.0}
    options: ClassVar[frozenset[str]] = Method.options | {"simclr_temperature"}

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        if self.is_active("simclr"):
            self.simclr_head = SimClrHead(encoder.visual.feature_dim)

    @property
    def views(self) -> Views:
        """One mild view for CLIP, two strong ones for SimCLR."""
        images: tuple[ImageView, ...] = ("plain", "augmented", "augmented") if self.is_active("simclr") else ("plain",)
        return Views(images=images, texts=("plain",))

    def embed(self, batch: Batch) -> Embeddings:
        """Project the first view; keep the features of the others."""
        plain, *strong = self.encode_images(batch.images)
        features = {"image_features": torch.stack([view.features for view in strong], dim=1)} if strong else {}
        return embeddings_of(
            batch,
            images=self.project_images([plain]),  # (B, 1, D)
            texts=self.project_texts(self.encode_texts(batch), batch.tokens),  # (B, 1, D)
            **features,  # (B, 2, E)
        )

    def terms(self) -> dict[str, Term]:
        """Match images with their texts, and views of an image with each other."""
        return {"clip": self.clip_term, "simclr": self.simclr_term}

    def simclr_term(self, embeddings: Embeddings) -> Tensor:
        """Tell the other view of an image from all views of all images, in nats, ()."""
        views = [self.simclr_head(embeddings.image_features[:, view]) for view in (0, 1)]  # BatchNorm sees one view
        queries = unit(torch.stack(views, dim=1))  # (B, 2, 256)
        rows = rows_of_rank(len(queries), queries.device)
        return nt_xent(queries, gather(queries), rows, temperature=self.config.simclr_temperature)
