"""CLIP: one picture, one text, one symmetric contrastive loss (arXiv 2103.00020)."""

from typing import ClassVar

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import Views
from declip_cli.methods.base import Method, embeddings_of
from declip_cli.methods.terms import PAIRS, contrastive_pairs
from declip_cli.model.clip import unit


class Clip(Method):
    """The baseline of the family, with the original's augmentation (STANDARD_SLIP)."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0}

    @property
    def views(self) -> Views:
        """One mildly cropped picture, the caption itself."""
        return Views(images=("plain",), texts=("plain",))

    def embed(self, batch: Batch) -> Embeddings:
        """Run both towers once."""
        images = self.project_images(self.image_views(batch.images))  # (B, 1, D)
        texts = self.project_texts(self.text_views(batch.tokens), batch.tokens)  # (B, 1, D)
        return embeddings_of(images, texts)

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Tell pairs apart."""
        losses = contrastive_pairs(
            unit(embeddings.images),
            unit(embeddings.texts),
            pairs=PAIRS[1],
            scale=self.scale(),
            label_smoothing=self.config.label_smoothing,
        )
        return self.weigh({"clip": losses.mean()} if self.has("clip") else {})
