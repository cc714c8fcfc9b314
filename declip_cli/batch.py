"""The parcels that change hands between the packages, and the legend of their dimensions.

B  pairs on this rank          M  keys of all ranks           N  samples
V  image views                 T  text views                  C  classes
L  tokens of a text            P  patches of an image         K  top-k
S  side of an image in pixels  E  width of a tower            H  heads
D  width of the shared embedding                              Q  width of token-wise features
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_cli.distributed import Gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the data room hands to the towers: views and tokens of B image-text pairs.

    Views are an axis in the order the method asked for (`config.Views`), never stacked in channels.
    """

    images: Tensor
    """uint8 RGB, (B, V, S, S, 3); or, in tests, normalized float, (B, V, 3, S, S)."""
    tokens: Tensor
    """Token ids, int64, (B, T, L); 0 is padding. L is the longest text of the batch or the context length."""
    mask_labels: Tensor
    """Ids hidden by masking in the text view of kind `masked`, -100 elsewhere, int64, (B, L)."""
    numbers: Tensor
    """Position of each pair in the data set, int64, (B,)."""
    text_lengths: Tensor | None = None
    """Tokens of each text without padding, int64, always on the CPU, (B, T); None where nobody counted them."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def with_text_lengths(self) -> "Batch":
        """Count the tokens of each text, for encoding texts of similar length together; before it leaves the CPU."""
        num_padding = (self.tokens.flip(-1) != 0).int().argmax(-1)  # (B, T); the last token is never 0
        return replace(self, text_lengths=self.tokens.shape[-1] - num_padding)

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors but the lengths to a device, without waiting where the memory is pinned."""
        names = [f.name for f in fields(self) if f.name != "text_lengths"]
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def split(self, size: int) -> list["Batch"]:
        """Cut into consecutive batches of at most `size` pairs."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        pieces = {name: value.split(size) for name, value in values.items() if value is not None}
        return [Batch(**dict(zip(pieces, piece, strict=True))) for piece in zip(*pieces.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What a method's `embed` hands to its `objective`: one row per pair in every field.

    Because each field is per pair, embeddings of micro-batches can be joined and cut at will; a field that the
    method does not use is an empty tensor of shape (B, 0).
    """

    images: Tensor
    """Projected image embeddings, not normalized, (B, V, D)."""
    texts: Tensor
    """Projected text embeddings, not normalized, (B, T, D)."""
    image_features: Tensor
    """Image features before the projection, (B, V', E)."""
    image_tokens: Tensor
    """Token-wise features of the patches of one view, (B, P, Q)."""
    text_tokens: Tensor
    """Token-wise features of one text, (B, L, Q)."""
    text_token_mask: Tensor
    """True where `text_tokens` counts, bool, (B, L)."""
    mask_losses: Tensor
    """Sum of the masked-language cross-entropies of each pair, in nats, (B,) or (B, 0)."""
    mask_counts: Tensor
    """Number of masked tokens of each pair, float, (B,) or (B, 0)."""
    numbers: Tensor
    """Position of each pair in the data set, int64, (B,)."""

    def __len__(self) -> int:
        return self.images.shape[0]

    @cached_property
    def unit_images(self) -> Gathered:
        """`images` scaled to unit length, for all terms of a step, (B, V, D) and (M, V, D)."""
        return Gathered(F.normalize(self.images.float(), dim=-1))

    @cached_property
    def unit_texts(self) -> Gathered:
        """`texts` scaled to unit length, for all terms of a step, (B, T, D) and (M, T, D)."""
        return Gathered(F.normalize(self.texts.float(), dim=-1))

    def detached(self) -> "Embeddings":
        """Leave the graph behind, and keep what is gathered."""
        other = Embeddings(**{f.name: getattr(self, f.name).detach() for f in fields(Embeddings)})
        shared = {name: value.detached() for name, value in vars(self).items() if isinstance(value, Gathered)}
        vars(other).update(shared)
        return other

    @staticmethod
    def join(parts: "list[Embeddings]") -> "Embeddings":
        """Concatenate embeddings of consecutive micro-batches along the pairs."""
        return Embeddings(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Embeddings)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What a method's `objective` returns: each term, unweighted, and their weighted sum."""

    total: Tensor
    """What is minimised, in nats where it is a cross-entropy, ()."""
    terms: dict[str, Tensor]
    """Every term by name, unweighted, each ()."""
