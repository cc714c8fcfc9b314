"""DeCLIP: self-supervision in each modality, multi-view supervision across, nearest neighbors (arXiv 2110.05208)."""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import ImageView, MethodConfig, TextView, Views
from declip_cli.distributed import Gathered, gather
from declip_cli.methods.base import Method, Term, embeddings_of
from declip_cli.methods.terms import contrastive_loss, mlm_loss, simclr_loss, simsiam_loss
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import SimClrHead, SimSiamPredictor, SimSiamProjector
from declip_cli.model.neighbors import NeighborQueue
from declip_cli.model.vision_transformer import ImageStates


class DeClip(Method):
    """Every supervision of the paper; each term can be switched off by its weight."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2}
    further_terms: ClassVar[frozenset[str]] = Method.further_terms | {"simclr"}
    options: ClassVar[frozenset[str]] = Method.options | {
        "pairs",
        "queue_size",
        "nn_symmetric",
        "nn_exclude_own",
        "queue_start",
        "queue_scope",
        "mlm_mean",
        "mask_special_ids",
        "cap_logit_scale",
        "head_width",
        "simclr_temperature",
    }

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        embed_dim = encoder.architecture.embed_dim
        if self.is_active("simsiam"):
            self.projector = SimSiamProjector(embed_dim, width=config.head_width)
            self.predictor = SimSiamPredictor(width=config.head_width)
        if self.is_active("simclr"):
            self.simclr_head = SimClrHead(encoder.visual.feature_dim, width=config.head_width)
        if self.is_active("nn"):
            self.queue = NeighborQueue(config.queue_size, embed_dim, exact=config.faithful)
            if self.config.queue_start == "random":
                self.queue.fill_randomly()

    @property
    def views(self) -> Views:
        """Two strong images, the masked caption and augmented ones; only what the weights ask for."""
        needs_two_images = self.config.pairs > 1 or self.is_active("simsiam") or self.is_active("simclr")
        images: tuple[ImageView, ...] = ("augmented", "augmented") if needs_two_images else ("augmented",)
        first: tuple[TextView, ...] = ("masked",) if self.is_active("mlm") else ("plain",)
        others: tuple[TextView, ...] = ("augmented",)
        return Views(images=images, texts=first + others * (self.num_texts - 1))

    @property
    def num_texts(self) -> int:
        """Texts of a pair, T."""
        return max(2, self.config.captions) if self.config.pairs == 4 else 1

    def embed(self, batch: Batch) -> Embeddings:
        """Run both towers on all views; predict the masked tokens of the first text."""
        images = self.encode_images(batch.images)
        states = self.encode_texts(batch)  # (B, T, L, E)
        losses, counts = self.mlm_losses(states[:, 0], batch)
        features = {"image_features": torch.stack([view.features for view in images], dim=1)}
        return embeddings_of(
            batch,
            images=self.project_images(images),  # (B, V, D)
            texts=self.project_texts(states, batch.tokens),  # (B, T, D)
            mlm_losses=losses,
            mlm_counts=counts,
            **(features if self.is_active("simclr") else {}),  # (B, 2, E)
            **self.token_fields(images[0], states[:, 0], batch.tokens[:, 0]),
            **self.word_fields(images[0], batch),
        )

    def token_fields(self, image: ImageStates, states: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Map the first views token by token; DeCLIP itself compares no tokens."""
        return {}

    def terms(self) -> dict[str, Term]:
        """Name the paper's four supervisions, and SimCLR, which may stand in place of SimSiam."""
        num_images = 1 if self.config.pairs == 1 else 2
        return {
            "clip": partial(self.clip_term, num_images=num_images, num_texts=self.num_texts),
            "simsiam": self.simsiam_term,
            "simclr": self.simclr_term,
            "mlm": self.mlm_term,
            "nn": self.nn_term,
        }

    def simsiam_term(self, embeddings: Embeddings) -> Tensor:
        """Predict each view of an image from the other, in [-1, 1], ()."""
        return simsiam_loss(embeddings.images, self.projector, self.predictor)

    def simclr_term(self, embeddings: Embeddings) -> Tensor:
        """Distinguish the other view of an image from all views of all images, in nats, ()."""
        return simclr_loss(embeddings.image_features, self.simclr_head, temperature=self.config.simclr_temperature)

    def mlm_term(self, embeddings: Embeddings) -> Tensor:
        """Average the masked-language loss over masked tokens, in nats per token, ()."""
        is_global = self.config.mlm_mean == "global"
        return mlm_loss(embeddings.mlm_losses, embeddings.mlm_counts, over_all_ranks=is_global)

    def nn_term(self, embeddings: Embeddings) -> Tensor:
        """Match images with the earlier texts nearest to their own, in nats, (); 0 while the queue is empty."""
        images, texts = embeddings.normalized_images, embeddings.normalized_texts.own
        if self.queue.count() == 0:
            return images.own.sum() * 0.0
        pair_indices = embeddings.pair_indices.repeat_interleave(texts.shape[1])  # (B·T,)
        found = self.queue.nearest(texts.flatten(0, 1), pair_indices if self.config.nn_exclude_own else None)
        # Every view of an image with the neighbor of every view of its text; never label-smoothed. The original only
        # goes from the image to the neighbor (prototype/model/declip.py:281-300).
        neighbors, contrast = Gathered(found.view_as(texts)), self.contrast(embeddings)
        return contrastive_loss(images, neighbors, contrast, is_symmetric=bool(self.config.nn_symmetric))

    @torch.no_grad()
    def update_queue(self, embeddings: Embeddings, is_good: Tensor) -> None:
        """Push the text features of all ranks, or of this one: the augmented texts first, as the original does.

        Args:
            embeddings: of this rank's whole batch; may hold NaN where `is_good` is False.
            is_good: False leaves the queue exactly as it was; bool, on the device, the same on every rank, ().
        """
        super().update_queue(embeddings, is_good)
        if not self.is_active("nn"):
            return
        texts, pair_indices = embeddings.normalized_texts.own, embeddings.pair_indices
        if self.config.queue_scope == "global":
            texts, pair_indices = embeddings.normalized_texts.all, gather(pair_indices)
        for view in reversed(range(texts.shape[1])):
            self.queue.push(texts[:, view], pair_indices, is_good)
