"""The data classes that pass between the packages, and the legend of their dimensions.

B  pairs on this rank          M  keys of all ranks           N  samples
V  image views                 T  text views                  C  classes
L  tokens of a text            P  patches of an image         K  top-k
S  side of an image in pixels  E  width of a tower            H  heads
D  width of the shared embedding                              Q  width of token-wise features
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.distributed import Gathered

NO_LABEL = -100
"""Label of a token that is not to be predicted, as `data` defines it without PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGroups:
    """In which groups of similar length N texts are encoded, so that little padding is computed."""

    order: Tensor
    """The text at each place of the first group, of the second and so on, int64, (N,)."""
    positions: Tensor
    """The place of each text in that order, int64, (N,)."""
    shapes: tuple[tuple[int, int], ...]
    """Texts of each group, and tokens that are encoded of each."""

    def to(self, device: torch.device) -> "TextGroups":
        """Move the tensors to a device, without waiting for it."""
        return replace(self, order=send(self.order, device), positions=send(self.positions, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the loader passes to the towers: views and tokens of B image-text pairs.

    Views are an axis in the order the method asked for (`config.Views`), never stacked in channels.
    """

    images: Tensor
    """uint8 RGB, (B, V, S, S, 3); or, in tests, normalized float, (B, V, 3, S, S)."""
    tokens: Tensor
    """Token ids, int64, (B, T, L); 0 is padding. L is the longest text of the batch or the context length."""
    mlm_labels: Tensor
    """Ids hidden by masking in the text view of kind `masked`, -100 elsewhere, int64, (B, L)."""
    pair_indices: Tensor
    """Position of each pair in the data set, int64, (B,)."""
    caption_ids: Tensor | None = None
    """The same number where captions are the same, int64, (B, C), C = 0 or None where nobody compared them."""
    boxes: Tensor | None = None
    """Left, top, right and bottom of each image view in shares of the whole image, left and right exchanged where it is
    flipped, float32, (B, V, 4); (B, 0, 4) or None where nobody asked: as if each view showed the whole."""
    text_lengths: Tensor | None = None
    """Tokens of each text without padding, int64, always on the CPU, (B, T); None where nobody counted them."""
    mlm_counts: Tensor | None = None
    """Labels of each pair, int64, always on the CPU, (B,); None where nobody counted them."""
    mlm_positions: Tensor | None = None
    """Places of these K labels in the flattened `mlm_labels`, ascending, int64, (K,); None as above. Negative ones
    at the end only fill up."""
    kept_patches: Tensor | None = None
    """Places of the patches that are seen of each view, int64, (B, V', K); None where the method chose none yet."""
    whole_features: Tensor | None = None
    """The teacher's features of the whole image, (B, E); None likewise."""
    text_groups: TextGroups | None = None
    """How the texts are encoded; None leaves the choice to the method."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def counted(self) -> "Batch":
        """Count tokens and labels before the batch leaves the CPU, so that nobody has to ask a device for them."""
        num_padding = (self.tokens.numpy()[..., ::-1] != 0).argmax(-1)  # (B, T); the last token is never 0
        has_label = self.mlm_labels.numpy() != NO_LABEL
        return replace(
            self,
            text_lengths=torch.from_numpy(self.tokens.shape[-1] - num_padding),
            mlm_counts=torch.from_numpy(has_label.sum(1)),
            mlm_positions=torch.from_numpy(np.flatnonzero(has_label)),
        )

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors but the counts to a device, without waiting for it."""
        return replace(
            self,
            images=send(self.images, device),
            tokens=send(self.tokens, device),
            mlm_labels=send(self.mlm_labels, device),
            pair_indices=send(self.pair_indices, device),
            caption_ids=None if self.caption_ids is None else send(self.caption_ids, device),
            boxes=None if self.boxes is None else send(self.boxes, device),
            mlm_positions=None if self.mlm_positions is None else send(self.mlm_positions, device),
        )

    def on_device(self) -> list[Tensor]:
        """Return the tensors that `to` moves."""
        values = (self.images, self.tokens, self.mlm_labels, self.pair_indices)
        others = (self.caption_ids, self.boxes, self.mlm_positions)
        return [*values, *(value for value in others if value is not None)]

    def split(self, size: int) -> "list[Batch]":
        """Cut into consecutive batches of at most `size` pairs, without waiting for a device."""
        names = [field.name for field in fields(self) if field.name not in ("mlm_positions", "text_groups")]
        pieces = {name: value.split(size) for name in names if (value := getattr(self, name)) is not None}
        if self.mlm_positions is not None and self.mlm_counts is not None:
            parts = self.mlm_positions.split([int(counts.numpy().sum()) for counts in self.mlm_counts.split(size)])
            step = size * self.mlm_labels.shape[1]
            pieces["mlm_positions"] = tuple(part - number * step for number, part in enumerate(parts))
        return [Batch(**dict(zip(pieces, piece, strict=True))) for piece in zip(*pieces.values(), strict=True)]


def send(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; a GPU copies without waiting from page-locked memory only."""
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What a method's `embed` passes to its `objective`: one row per pair in every field.

    Because each field is per pair, embeddings of micro-batches can be joined and cut at will; a field that the
    method does not use is an empty tensor of shape (B, 0).
    """

    images: Tensor
    """Projected image embeddings, not normalized, (B, V, D)."""
    texts: Tensor
    """Projected text embeddings, not normalized, (B, T, D)."""
    image_features: Tensor
    """Image features before the projection, (B, V', E)."""
    text_features: Tensor
    """Text features before the projection, (B, T', E)."""
    image_tokens: Tensor
    """Token-wise features of the patches of one view, (B, P, Q)."""
    text_tokens: Tensor
    """Token-wise features of one text, (B, L, Q)."""
    text_token_mask: Tensor
    """True where `text_tokens` counts, bool, (B, L)."""
    mlm_losses: Tensor
    """Sum of the masked-language cross-entropies of each pair, in nats, (B,) or (B, 0)."""
    mlm_counts: Tensor
    """Number of masked tokens of each pair, float, (B,) or (B, 0)."""
    word_losses: Tensor
    """Cross-entropy of the words predicted from each image, in nats, (B,) or (B, 0)."""
    words: Tensor
    """Ids of each caption's tokens, every id once, -1 elsewhere, int64, (B, L)."""
    pair_indices: Tensor
    """Position of each pair in the data set, int64, (B,)."""
    caption_ids: Tensor
    """The same number where captions are the same, int64, (B, C) or (B, 0)."""

    def __len__(self) -> int:
        return self.images.shape[0]

    @cached_property
    def normalized_images(self) -> Gathered:
        """`images` scaled to unit length, for all terms of a step, (B, V, D) and (M, V, D)."""
        return Gathered(F.normalize(self.images.float(), dim=-1))

    @cached_property
    def normalized_texts(self) -> Gathered:
        """`texts` scaled to unit length, for all terms of a step, (B, T, D) and (M, T, D)."""
        return Gathered(F.normalize(self.texts.float(), dim=-1))

    @cached_property
    def captions(self) -> Gathered:
        """`caption_ids` for all terms of a step, (B, C) and (M, C)."""
        return Gathered(self.caption_ids)

    def detached(self) -> "Embeddings":
        """Detach from the graph, and keep what is gathered."""
        other = Embeddings(**{name: getattr(self, name).detach() for name in EMBEDDING_FIELDS})
        shared = {name: value.detached() for name, value in vars(self).items() if isinstance(value, Gathered)}
        vars(other).update(shared)
        return other

    @staticmethod
    def join(parts: "list[Embeddings]") -> "Embeddings":
        """Concatenate embeddings of consecutive micro-batches along the pairs."""
        return Embeddings(**{name: torch.cat([getattr(p, name) for p in parts]) for name in EMBEDDING_FIELDS})


EMBEDDING_FIELDS = tuple(field.name for field in fields(Embeddings))
"""Names of its fields; as a constant, since torch.compile cannot ask for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What a method's `objective` returns: each term, unweighted, and their weighted sum."""

    total: Tensor
    """What is minimized, in nats where it is a cross-entropy, ()."""
    terms: dict[str, Tensor]
    """Every term by name, unweighted, each ()."""
