"""The contract of a method: views in, embeddings per pair, one objective over the full batch."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.config import MethodConfig, Views
from declip_cli.config_checks import require
from declip_cli.losses import masked_cross_entropy
from declip_cli.model.clip import DualEncoder
from declip_cli.model.text_transformer import VOCABULARY_SIZE
from declip_cli.model.vision_transformer import ImageStates, VisionTransformer


class Method(nn.Module, ABC):
    """A dual encoder with an objective.

    `embed` is expensive and works on any part of a batch; `objective` is cheap and wants this rank's rows of the
    full batch. Because the split is the same for all methods, big batches are trained from small forward passes
    (`train/big_batch.py`) without a line in any method.

    Args:
        encoder: the towers; with token-wise heads if the method compares tokens.
        config: weights and options.

    Raises:
        ConfigError: a weight for a term the method does not have.
    """

    default_weights: ClassVar[dict[str, float]]
    """Weight of every term of the method."""
    options: ClassVar[frozenset[str]] = frozenset({"name", "faithful", "weights", "label_smoothing"})
    """Fields of `MethodConfig` that change something here."""
    is_token_wise: ClassVar[bool] = False
    """Whether the encoder needs token-wise heads."""

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__()
        unknown = sorted(set(config.weights) - set(self.default_weights))
        require(
            not unknown,
            f"method {config.name} has no loss term {', '.join(unknown)}",
            remedy=f"its terms are {', '.join(self.default_weights)}: --set method.weights.NAME=NUMBER",
        )
        self.encoder = encoder
        self.config = config
        self.weights = self.default_weights | config.weights
        self.mask_head: nn.Linear | None = None
        if self.weights.get("mlm"):
            self.mask_head = nn.Linear(encoder.text.feature_dim, VOCABULARY_SIZE)
        if config.faithful and isinstance(encoder.visual, VisionTransformer):
            # The original never trains the patch embedding (protocol: freeze_conv1).
            encoder.visual.conv1.weight.requires_grad_(False)

    @property
    @abstractmethod
    def views(self) -> Views:
        """The views the loader is to make."""

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """Run the towers on any number of pairs."""

    @abstractmethod
    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Score this rank's rows of the full batch against all ranks'."""

    def remember(self, embeddings: Embeddings) -> None:
        """Take features of this step into the method's memory; most methods have none."""

    def has(self, term: str) -> bool:
        """Tell whether a term counts in this run."""
        return self.weights.get(term, 0.0) != 0.0

    def weigh(self, terms: dict[str, Tensor]) -> LossTerms:
        """Add the terms up by their weights."""
        weighted = [self.weights[name] * value for name, value in terms.items()]
        require(
            bool(weighted),
            f"all loss terms of method {self.config.name} are switched off",
            remedy=f"give at least one of {', '.join(self.default_weights)} a weight above 0",
        )
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms)

    def scale(self) -> Tensor:
        """Exponentiate the logit scale; the faithful mode caps the value at 100 but lets the gradient pass."""
        scale = self.encoder.logit_scale.exp()
        if self.config.faithful:
            return scale - (scale - scale.clamp(max=100.0)).detach()
        return scale

    def image_views(self, images: Tensor) -> list[ImageStates]:
        """Run the image tower on each view.

        Args:
            images: (B, V, …) as in `Batch`.

        Returns:
            One result per view, each of B pictures.
        """
        num_views = images.shape[1]
        if self.encoder.visual.is_batch_dependent:  # BatchNorm is to see one view at a time
            return [self.encoder.image_states(images[:, view]) for view in range(num_views)]
        states = self.encoder.image_states(images.transpose(0, 1).flatten(0, 1))  # V·B pictures
        features, patches = states.features.chunk(num_views), states.patches.chunk(num_views)
        return [ImageStates(features=f, patches=p) for f, p in zip(features, patches, strict=True)]

    def text_views(self, tokens: Tensor) -> Tensor:
        """Run the text tower on all views at once, (B, T, L) → token states (B, T, L, E)."""
        num_views = tokens.shape[1]
        states = self.encoder.text(tokens.flatten(0, 1))
        views: Tensor = states.unflatten(0, (-1, num_views))
        return views

    def project_images(self, views: list[ImageStates]) -> Tensor:
        """Map views into the shared embedding, → (B, V, D)."""
        return torch.stack([self.encoder.project_image(view) for view in views], dim=1)

    def project_texts(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Map token states into the shared embedding, (B, T, L, E) → (B, T, D)."""
        features = self.encoder.text.read_off(states.flatten(0, 1), tokens.flatten(0, 1))
        embeds: Tensor = self.encoder.text.project(features).unflatten(0, states.shape[:2])
        return embeds

    def mask_losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the masked tokens, at masked positions only.

        Args:
            states: token states of the masked view, (B, L, E).
            labels: the hidden ids, -100 elsewhere, (B, L).

        Returns:
            Sum of the cross-entropies and number of masked tokens of each pair, (B,) each; (B, 0) without the term.
        """
        if self.mask_head is None:
            return states.new_zeros(len(states), 0), states.new_zeros(len(states), 0)
        texts, positions = (labels != -100).nonzero(as_tuple=True)  # (K,)
        logits = self.mask_head(states[texts, positions])  # (K, V)
        losses = masked_cross_entropy(logits, labels[texts, positions], texts, num_owners=len(states))
        return losses, (labels != -100).sum(1).float()


def embeddings_of(images: Tensor, texts: Tensor, **others: Tensor) -> Embeddings:
    """Fill the fields a method does not use with nothing.

    Args:
        images: (B, V, D).
        texts: (B, T, D).
        others: any other field of `Embeddings`.

    Returns:
        The parcel for `objective`.
    """
    empty = images.new_zeros(len(images), 0)
    names = ("image_features", "image_tokens", "text_tokens", "text_token_mask", "mask_losses", "mask_counts")
    return Embeddings(images=images, texts=texts, **{name: others.get(name, empty) for name in names})
