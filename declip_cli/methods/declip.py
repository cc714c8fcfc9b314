"""DeCLIP: self-supervision in each modality, multi-view supervision across, nearest neighbours (arXiv 2110.05208)."""

from typing import ClassVar

from torch import Tensor

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import ImageView, MethodConfig, TextView, Views
from declip_cli.distributed import gather
from declip_cli.methods.base import Method, embeddings_of
from declip_cli.methods.terms import PAIRS, contrastive_pairs, masked_language, nearest_neighbours, siamese
from declip_cli.model.clip import DualEncoder, unit
from declip_cli.model.heads import SimSiamPredictor, SimSiamProjector
from declip_cli.model.neighbours import NeighbourQueue


class DeClip(Method):
    """Every supervision of the paper; each term can be switched off by its weight."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2}
    options: ClassVar[frozenset[str]] = Method.options | {"pairs", "queue_size"}

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        embed_dim = encoder.architecture.embed_dim
        if self.has("simsiam"):
            self.projector, self.predictor = SimSiamProjector(embed_dim), SimSiamPredictor()
        if self.has("nn"):
            self.queue = NeighbourQueue(config.queue_size, embed_dim)
            if config.faithful:
                self.queue.fill_randomly()

    @property
    def views(self) -> Views:
        """Two strong pictures, the masked caption and an augmented one; only what the weights ask for."""
        needs_two_images = self.config.pairs > 1 or self.has("simsiam")
        images: tuple[ImageView, ...] = ("augmented", "augmented") if needs_two_images else ("augmented",)
        first: TextView = "masked" if self.has("mlm") else "plain"
        return Views(images=images, texts=(first, "augmented") if self.config.pairs == 4 else (first,))

    def embed(self, batch: Batch) -> Embeddings:
        """Run both towers on all views; predict the masked tokens of the first text."""
        images = self.project_images(self.image_views(batch.images))  # (B, V, D)
        states = self.text_views(batch.tokens)  # (B, T, L, E)
        texts = self.project_texts(states, batch.tokens)  # (B, T, D)
        losses, counts = self.mask_losses(states[:, 0], batch.mask_labels)
        return embeddings_of(images, texts, mask_losses=losses, mask_counts=counts)

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Add up the paper's four supervisions."""
        return self.weigh(self.declip_terms(embeddings))

    def declip_terms(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """Compute each term that counts."""
        images, texts = unit(embeddings.images), unit(embeddings.texts)
        faithful = self.config.faithful
        terms = {}
        if self.has("clip"):
            terms["clip"] = contrastive_pairs(
                images,
                texts,
                pairs=PAIRS[self.config.pairs],
                scale=self.scale(),
                label_smoothing=self.config.label_smoothing,
            ).mean()
        if self.has("simsiam"):
            terms["simsiam"] = siamese(embeddings.images, self.projector, self.predictor)
        if self.has("mlm"):
            terms["mlm"] = masked_language(embeddings.mask_losses, embeddings.mask_counts, per_rank=faithful)
        if self.has("nn"):
            terms["nn"] = nearest_neighbours(
                images, texts, self.queue, scale=self.scale(), both_directions=not faithful
            )
        return terms

    def remember(self, embeddings: Embeddings) -> None:
        """Push the text features: the augmented ones first, as the original does."""
        if self.has("nn"):
            texts = unit(embeddings.texts.detach())
            texts = texts if self.config.faithful else gather(texts)
            for view in reversed(range(texts.shape[1])):
                self.queue.push(texts[:, view])
