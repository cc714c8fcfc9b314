"""FILIP: images and texts compared token by token (arXiv 2111.07783)."""

from typing import ClassVar

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import Views
from declip_cli.methods.base import Term, embeddings_of
from declip_cli.methods.token_wise import TokenWise


class Filip(TokenWise):
    """Late interaction on the most relevant tokens; the loss on whole images and texts has weight 0."""

    default_weights: ClassVar[dict[str, float]] = {"filip": 1.0, "clip": 0.0}
    options: ClassVar[frozenset[str]] = TokenWise.options | {"filip_text", "mask_special_ids"}

    @property
    def views(self) -> Views:
        """One strong view of the image; of the text, what `filip_text` says."""
        return Views(
            images=("augmented",),
            texts=(self.config.filip_text or "plain",),
            pad_to_context=bool(self.config.score_padding),
        )

    def embed(self, batch: Batch) -> Embeddings:
        """Run both towers once; map what they give token by token."""
        images = self.encode_images(batch.images)
        states = self.encode_texts(batch)  # (B, 1, L, E)
        return embeddings_of(
            batch,
            images=self.project_images(images),  # (B, 1, D)
            texts=self.project_texts(states, batch.tokens),  # (B, 1, D)
            **self.token_fields(images[0], states[:, 0], batch.tokens[:, 0]),
            **self.word_fields(images[0], batch),
        )

    def terms(self) -> dict[str, Term]:
        """Match images with their texts by tokens, and by whole embeddings if weighted."""
        return {"filip": self.filip_term, "clip": self.clip_term}
