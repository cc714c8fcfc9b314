"""SLIP: CLIP on one view, SimCLR on two others of the same picture (arXiv 2112.12750)."""

from typing import ClassVar

import torch

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import MethodConfig, Views
from declip_cli.distributed import gather, rows_of_rank
from declip_cli.losses import nt_xent
from declip_cli.methods.base import Method, embeddings_of
from declip_cli.methods.terms import PAIRS, contrastive_pairs
from declip_cli.model.clip import DualEncoder, unit
from declip_cli.model.heads import SimClrHead


class Slip(Method):
    """Image self-supervision beside the language supervision."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0, "simclr": 1.0}
    options: ClassVar[frozenset[str]] = Method.options | {"simclr_temperature"}

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        if self.has("simclr"):
            self.simclr_head = SimClrHead(encoder.visual.feature_dim)

    @property
    def views(self) -> Views:
        """One mild view for CLIP, two strong ones for SimCLR."""
        strong: tuple[str, ...] = ("augmented", "augmented") if self.has("simclr") else ()
        return Views(images=("plain", *strong), texts=("plain",))  # type: ignore[arg-type]

    def embed(self, batch: Batch) -> Embeddings:
        """Project the first view; keep the features of the others."""
        base, *strong = self.image_views(batch.images)
        images = self.project_images([base])  # (B, 1, D)
        texts = self.project_texts(self.text_views(batch.tokens), batch.tokens)  # (B, 1, D)
        if not strong:
            return embeddings_of(images, texts)
        features = torch.stack([view.features for view in strong], dim=1)  # (B, 2, E)
        return embeddings_of(images, texts, image_features=features)

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Tell pairs apart, and pictures apart."""
        terms = {}
        if self.has("clip"):
            images, texts = unit(embeddings.images), unit(embeddings.texts)
            scale = self.encoder.logit_scale.exp()  # the original's SLIP has no cap at 100
            smoothing = self.config.label_smoothing
            losses = contrastive_pairs(images, texts, pairs=PAIRS[1], scale=scale, label_smoothing=smoothing)
            terms["clip"] = losses.mean()
        if self.has("simclr"):
            views = [self.simclr_head(embeddings.image_features[:, view]) for view in (0, 1)]
            queries = unit(torch.stack(views, dim=1))  # (B, 2, Q)
            rows = rows_of_rank(len(queries), queries.device)
            temperature = self.config.simclr_temperature
            terms["simclr"] = nt_xent(queries, gather(queries), rows, temperature=temperature)
        return self.weigh(terms)
