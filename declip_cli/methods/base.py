"""The contract of a method: views in, embeddings per pair, one objective over the full batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from declip_cli.batch import EMBEDDING_FIELDS, NO_LABEL, Batch, Embeddings, LossTerms
from declip_cli.config import MethodConfig, Views
from declip_cli.distributed import Gathered
from declip_cli.errors import ChoiceError, require
from declip_cli.losses import masked_cross_entropy, word_cross_entropy
from declip_cli.methods.length_groups import call_tokens, encode_in_groups, group_texts
from declip_cli.methods.terms import Contrast, contrastive_loss, own_ids
from declip_cli.model.clip import DualEncoder, text_token_mask
from declip_cli.model.heads import WordHead, distinct_ids
from declip_cli.model.text_transformer import VOCABULARY_SIZE
from declip_cli.model.vision_transformer import ImageStates, VisionTransformer
from declip_cli.presets import resolve_switches

Term: TypeAlias = Callable[[Embeddings], Tensor]
"""Computes one loss term, (), from this rank's rows of the full batch."""


class Method(nn.Module, ABC):
    """A dual encoder with an objective.

    `embed` is expensive and works on any part of a batch; `objective` is cheap and wants this rank's rows of the
    full batch. Because every method is split this way, big batches are trained from small forward passes
    (GradCache) without a line about it in any method.

    Args:
        encoder: the towers; with token-wise heads if the method compares tokens.
        config: weights and switches; switches that are None take the preset's value.

    Raises:
        ConfigError: a weight for a term the method does not have, or no term with a weight above 0.
    """

    default_weights: ClassVar[dict[str, float]]
    """Weight of every term of the method."""
    further_terms: ClassVar[frozenset[str]] = frozenset({"words"})
    """Terms that only count if they are given a weight."""
    options: ClassVar[frozenset[str]] = frozenset(
        {
            "name",
            "faithful",
            "weights",
            "label_smoothing",
            "contrastive",
            "positives",
            "captions",
            "batch_norm",
            "freeze_patch_embed",
        }
    )
    """Fields of `MethodConfig` that change something for this method."""
    is_token_wise: ClassVar[bool] = False
    """Whether the encoder needs token-wise heads."""

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__()
        config = resolve_switches("method", config, is_faithful=config.faithful)
        names = ", ".join((*self.default_weights, *sorted(self.further_terms)))
        unknown = sorted(set(config.weights) - set(self.default_weights) - self.further_terms)
        if unknown:
            raise ChoiceError(
                f"method {config.name} has no loss term {', '.join(unknown)}",
                remedy=f"its terms are {names}: --set method.weights.NAME=NUMBER",
            )
        self.encoder = encoder
        self.config = config
        self.weights = self.default_weights | config.weights
        require(
            any(self.weights.values()),
            f"all loss terms of method {config.name} are switched off",
            remedy=f"give at least one of {names} a weight above 0",
        )
        num_texts = len(self.views.texts)
        require(
            config.captions <= num_texts,
            f"method {config.name} shows at most {num_texts} of a pair's captions here (got {config.captions})",
            remedy=f"--set method.captions={num_texts}",
        )
        if config.contrastive == "sigmoid":
            require(
                config.label_smoothing == 0,
                f"the sigmoid loss has no label smoothing (got {config.label_smoothing})",
                remedy="--set method.label_smoothing=0, or --set method.contrastive=softmax",
            )
            encoder.add_logit_bias()
        self.mlm_head: nn.Linear | None = None
        if self.is_active("mlm"):
            self.mlm_head = nn.Linear(encoder.text.feature_dim, VOCABULARY_SIZE)
        self.word_head = WordHead(encoder.visual.feature_dim, VOCABULARY_SIZE) if self.is_active("words") else None
        if config.freeze_patch_embed and isinstance(encoder.visual, VisionTransformer):
            encoder.visual.conv1.weight.requires_grad_(False)

    @property
    @abstractmethod
    def views(self) -> Views:
        """The views the loader makes for this method."""

    def prepare(self, batch: Batch, *, size: int) -> Batch:  # noqa: ARG002  (others encode so many pairs at a time)
        """Add to a batch what does not depend on how it is divided, and no gradient goes through."""
        return batch

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """Run the towers on any number of pairs."""

    @abstractmethod
    def terms(self) -> dict[str, Term]:
        """Name the function of every loss term; `objective` calls those with a weight."""

    def objective(self, embeddings: Embeddings) -> LossTerms:
        """Score this rank's rows of the full batch against all ranks'.

        Args:
            embeddings: from `embed`, of this rank's whole batch.

        Returns:
            The terms that count and their weighted sum; the gradient of the full batch's loss is the mean over the
            ranks of each rank's gradient.
        """
        terms = self.terms() | {"words": self.words_term}
        values = {name: term(embeddings) for name, term in terms.items() if self.is_active(name)}
        weighted = [self.weights[name] * value for name, value in values.items()]
        return LossTerms(total=torch.stack(weighted).sum(), terms=values)

    def update_queue(self, embeddings: Embeddings, is_good: Tensor) -> None:
        """Store features of this step, and count its words, for later steps; does nothing where no term needs it.

        Args:
            embeddings: what the objective was computed from; may hold NaN where `is_good` is False.
            is_good: False leaves the queue exactly as it was; bool, on the device, the same on every rank, ().
        """
        if self.word_head is not None:
            self.word_head.count(embeddings.words, is_good)

    def before_step(self, share: float) -> None:
        """Prepare a step, at a share of the run in [0, 1]; does nothing where no term needs it."""

    def is_active(self, term: str) -> bool:
        """Return whether a term counts in this run."""
        return self.weights.get(term, 0.0) != 0.0

    def logit_scale_in_use(self) -> nn.Parameter:
        """Return the logit scale that the weightiest contrastive term trains, a logarithm, ()."""
        return self.encoder.logit_scale

    def exp_logit_scale(self) -> Tensor:
        """Return what cosines of whole images and texts are multiplied by, ().

        With `cap_logit_scale` the value is capped at 100 and the gradient is that of the uncapped scale. Only methods
        that list the option cap it: the original's SLIP and FILIP never do.
        """
        scale = self.encoder.logit_scale.exp()
        if self.config.cap_logit_scale and "cap_logit_scale" in self.options:
            return scale - (scale - scale.clamp(max=100.0)).detach()
        return scale

    def ids(self, embeddings: Embeddings) -> Gathered:
        """Say which pairs of this step are positives of each other: those that share an identity, (B, I)."""
        if self.config.positives == "caption":
            return embeddings.captions
        return own_ids(len(embeddings), embeddings.images.device)

    def contrast(self, embeddings: Embeddings) -> Contrast:
        """Say how whole images and texts are distinguished in this step, without label smoothing."""
        return Contrast(ids=self.ids(embeddings), scale=self.exp_logit_scale(), bias=self.encoder.logit_bias)

    def clip_term(self, embeddings: Embeddings, *, num_images: int = 1, num_texts: int = 1) -> Tensor:
        """Match the first views of images with those of texts, the mean over all pairs of them, in nats, ()."""
        contrast = replace(self.contrast(embeddings), label_smoothing=self.config.label_smoothing)
        images, texts = embeddings.normalized_images.first(num_images), embeddings.normalized_texts.first(num_texts)
        return contrastive_loss(images, texts, contrast)

    def encode_images(self, images: Tensor, kept: Tensor | None = None) -> list[ImageStates]:
        """Run the image tower on each view.

        Args:
            images: (B, V, …) as in `Batch`.
            kept: places of the patches that a vision transformer sees, int64, (B, V, K); None: all.

        Returns:
            One result per view, each of B images.
        """
        num_views = images.shape[1]
        if self.encoder.visual.is_batch_dependent:  # BatchNorm sees one view at a time
            return [self.encoder.image_states(images[:, view]) for view in range(num_views)]
        chosen = None if kept is None else kept.transpose(0, 1).flatten(0, 1)  # (V·B, K)
        states = self.encoder.image_states(images.transpose(0, 1).flatten(0, 1), chosen)  # V·B images
        features, patches = states.features.chunk(num_views), states.patches.chunk(num_views)
        return [ImageStates(features=f, patches=p) for f, p in zip(features, patches, strict=True)]

    def encode_texts(self, batch: Batch) -> Tensor:
        """Run the text tower on all views at once, or on groups of similar length if padding does not matter.

        Args:
            batch: B pairs with T text views; grouped if it says how, or how long its texts are.

        Returns:
            Token states, (B, T, L, E).
        """
        texts, groups, device = batch.tokens.flatten(0, 1), batch.text_groups, batch.tokens.device  # (B·T, L)
        if groups is None and batch.text_lengths is not None and not self.views.pad_to_context:
            groups = group_texts(batch.text_lengths.flatten(), call_tokens=call_tokens(device)).to(device)
        tower, embedded = self.encoder.text.contextualize, self.encoder.text.embed(texts)
        states = tower(embedded) if groups is None else encode_in_groups(tower, embedded, groups)
        return torch.unflatten(states, 0, batch.tokens.shape[:2])

    def project_images(self, views: list[ImageStates]) -> Tensor:
        """Map image features into the shared embedding, not normalized, → (B, V, D)."""
        return torch.stack([self.encoder.project_image(view) for view in views], dim=1)

    def pool_texts(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Take the text features at each text's end, (B, T, L, E) and (B, T, L) → (B, T, E)."""
        features = self.encoder.text.pool_at_end(states.flatten(0, 1), tokens.flatten(0, 1))  # (B·T, E)
        return torch.unflatten(features, 0, states.shape[:2])

    def project_texts(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Map token states into the shared embedding, not normalized, (B, T, L, E) → (B, T, D)."""
        return self.encoder.text.project(self.pool_texts(states, tokens))

    def mlm_losses(self, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predict the masked tokens, at masked positions only.

        Args:
            states: token states of the masked view, (B, L, E).
            batch: whose labels are wanted; the device is asked where they are if nobody has counted them.

        Returns:
            Sum of the cross-entropies and number of masked tokens of each pair, (B,) each; (B, 0) without the term.

        Source: BERT, arXiv 1810.04805; DeCLIP, arXiv 2110.05208, section 3.2.
        """
        if self.mlm_head is None:
            return states.new_zeros(len(states), 0), states.new_zeros(len(states), 0)
        labels, positions = batch.mlm_labels, batch.mlm_positions  # (B, L), (K,)
        if positions is None:
            positions = (labels != NO_LABEL).flatten().nonzero()[:, 0]
        fills_up, positions = positions < 0, positions.clamp_min(0)  # (K,) each
        text_ids, columns = positions // labels.shape[1], positions % labels.shape[1]  # (K,) each
        logits = self.mlm_head(states[text_ids, columns])  # (K, vocabulary)
        hidden = labels[text_ids, columns].masked_fill(fills_up, NO_LABEL)
        losses = masked_cross_entropy(logits, hidden, text_ids, num_texts=len(states))
        return losses, (labels != NO_LABEL).sum(1).float()

    def word_fields(self, image: ImageStates, batch: Batch) -> dict[str, Tensor]:
        """Predict the tokens of the first caption from one view of the image.

        Args:
            image: of the view, B images.
            batch: the pairs.

        Returns:
            Fields of `Embeddings`: `word_losses` (B,) and `words` (B, L); none without the term.

        Source: SuperCLIP, arXiv 2512.14480.
        """
        if self.word_head is None:
            return {}
        tokens = torch.where(batch.mlm_labels == NO_LABEL, batch.tokens[:, 0], batch.mlm_labels)  # (B, L), none hidden
        words = distinct_ids(tokens, text_token_mask(tokens))
        return {"word_losses": word_cross_entropy(*self.word_head(image.patches.mean(1), words)), "words": words}

    def words_term(self, embeddings: Embeddings) -> Tensor:
        """Average how badly the caption's tokens were predicted from the image, in nats, ()."""
        return embeddings.word_losses.mean()


def embeddings_of(batch: Batch, *, images: Tensor, texts: Tensor, **others: Tensor) -> Embeddings:
    """Collect the input of `objective`; fields that a method does not use are empty.

    Args:
        batch: the pairs, for their numbers, which stand in for the identities of captions that nobody compared.
        images: (B, V, D).
        texts: (B, T, D).
        others: any other field of `Embeddings`.

    Returns:
        The parcel.
    """
    empty = images.new_zeros(len(images), 0)
    unused = dict.fromkeys(EMBEDDING_FIELDS, empty)
    caption_ids = batch.pair_indices[:, None] if batch.caption_ids is None else batch.caption_ids
    known = {"images": images, "texts": texts, "pair_indices": batch.pair_indices, "caption_ids": caption_ids}
    return Embeddings(**unused | known | others)
