"""CLIP: one image, one text, one symmetric contrastive loss (arXiv 2103.00020)."""

from functools import partial
from typing import ClassVar

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import TextView, Views
from declip_cli.methods.base import Method, Term, embeddings_of


class Clip(Method):
    """The baseline of the family, with the original's augmentation (STANDARD_SLIP)."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0}
    options: ClassVar[frozenset[str]] = Method.options | {"cap_logit_scale"}

    @property
    def views(self) -> Views:
        """One mildly cropped image and the captions themselves."""
        texts: tuple[TextView, ...] = ("plain",)
        return Views(images=("plain",), texts=texts * self.config.captions)

    def embed(self, batch: Batch) -> Embeddings:
        """Run the image tower once, the text tower on each caption."""
        images = self.encode_images(batch.images)
        return embeddings_of(
            batch,
            images=self.project_images(images),  # (B, 1, D)
            texts=self.project_texts(self.encode_texts(batch), batch.tokens),  # (B, T, D)
            **self.word_fields(images[0], batch),
        )

    def terms(self) -> dict[str, Term]:
        """Match images with their texts."""
        return {"clip": partial(self.clip_term, num_texts=self.config.captions)}
