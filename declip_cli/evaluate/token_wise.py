"""Pictures and captions compared token by token, for models of the FILIP kind, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from declip_cli.data.dataset import Dataset
from declip_cli.evaluate.features import FeatureOptions, ImageFeatures, map_images
from declip_cli.evaluate.ranking import Ranks, ranks_in_rows
from declip_cli.evaluate.shares import Part, encode_shares, take
from declip_cli.evaluate.texts import length_sorted_batches
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import autocast

_CHUNK_SIMILARITIES = 2**24
"""Similarities of a patch and a token held at once: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """Token features of M texts, without padding."""

    tokens: Tensor
    """Unit length, of all texts one after the other, (T, Q)."""
    lengths: Tensor
    """int64, (M,)."""

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "TokenTexts":
        """Move both tensors to a device."""
        return TokenTexts(self.tokens.to(device), self.lengths.to(device))

    def select(self, numbers: Tensor) -> "TokenTexts":
        """Take some texts; `numbers` int64, (m,)."""
        parts = self.tokens.split(self.lengths.tolist())
        return TokenTexts(torch.cat([parts[number] for number in numbers.tolist()]), self.lengths[numbers])

    def padded(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of texts first to last - 1, (m, L, Q), and which are none, bool, (m, L)."""
        lengths = self.lengths[first:last]  # (m,)
        start = int(self.lengths[:first].sum())
        rows = self.tokens[start : start + int(lengths.sum())].split(lengths.tolist())
        tokens = pad_sequence(list(rows), batch_first=True)  # (m, L, Q)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]


def encode_image_tokens(model: PretrainedModel, dataset: Dataset, *, options: FeatureOptions) -> ImageFeatures:
    """Encode images patch by patch.

    Args:
        model: with token-wise heads.
        dataset: N images.
        options: batch size, precision, threads, store.

    Returns:
        Unit length patch features, (N', P, Q), and what was skipped.
    """
    shape: list[int] = []

    def encode(images: Tensor) -> Tensor:
        tokens = F.normalize(model.encoder.encode_image_tokens(images).float(), dim=-1)  # (B, P, Q)
        shape[:] = tokens.shape[1:]
        return tokens.flatten(1)  # (B, P Q)

    found = map_images(model, dataset, encode, label="image tokens", options=options)
    width = shape[1] if shape else _token_width(model)
    tokens = found.features.unflatten(1, (-1, width))  # (N', P, Q)
    return ImageFeatures(features=tokens, kept=found.kept, skipped=found.skipped)


def _token_width(model: PretrainedModel) -> int:
    side = model.image_side_px
    device = next(model.encoder.parameters()).device
    with torch.inference_mode():
        images = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
        return int(model.encoder.encode_image_tokens(images).shape[-1])


def encode_text_tokens(model: PretrainedModel, texts: Sequence[str], *, options: FeatureOptions) -> TokenTexts:
    """Encode texts token by token, start and end included, padding left out.

    Args:
        model: with token-wise heads.
        texts: M texts.
        options: batch size, precision.

    Returns:
        Unit length token features, float32 on the CPU.
    """
    found = encode_shares(len(texts), partial(_encode_tokens, model, texts), options)
    return TokenTexts(found.rows, torch.bincount(found.numbers, minlength=len(texts)))


def _encode_tokens(model: PretrainedModel, texts: Sequence[str], own: range, options: FeatureOptions) -> Part:
    """Encode the texts of a share, one row per token."""
    device = next(model.encoder.parameters()).device
    texts = take(texts, own)
    found: dict[int, Tensor] = {}
    with torch.inference_mode(), autocast(options.precision, device):
        for numbers, ids in length_sorted_batches(texts, model.context_length, options.text_batch_size):
            tokens, mask = model.encoder.encode_text_tokens(ids.to(device))  # (B, L, Q), (B, L)
            unit = F.normalize(tokens.float(), dim=-1).cpu()  # (B, L, Q)
            for number, row, is_token in zip(numbers.tolist(), unit, mask.cpu(), strict=True):
                found[number] = row[is_token]  # (L', Q)
            if options.progress is not None:
                options.progress(len(found), len(texts))
    rows = [found[number] for number in range(len(texts))]
    lengths = torch.tensor([len(row) for row in rows])  # (M',)
    return Part(torch.cat(rows), torch.tensor(own).repeat_interleave(lengths))


def token_wise_ranks(images: Tensor, texts: TokenTexts, owners: Tensor) -> Ranks:
    """Rank right answers by token-wise similarity, both ways.

    A picture scores a caption by the best token for each patch, averaged over the patches; a caption scores a
    picture by the best patch for each token, averaged over the tokens. Nothing is left out of either side: the
    restriction to 16 tokens belongs to training.

    Args:
        images: unit length, (N, P, Q).
        texts: captions of these pictures, M.
        owners: the picture of each text, int64, (M,).

    Returns:
        The ranks; see `paired_ranks` for ties and pictures without captions.

    Source: FILIP, arXiv 2111.07783, equations 3 to 5.
    """
    places = torch.arange(len(images), device=images.device)  # (N,)
    longest = int(texts.lengths.max())
    size = max(1, int((_CHUNK_SIMILARITIES / (images.shape[1] * longest)) ** 0.5))
    with_text = places[torch.isin(places, owners)]  # (N',)
    chunks = [texts.padded(first, min(first + size, len(texts))) for first in range(0, len(texts), size)]
    of_images = []
    for numbers in with_text.split(size):
        scores = torch.cat([_score_texts(images[numbers], *chunk) for chunk in chunks], 1)  # (n, M)
        of_images.append(ranks_in_rows(scores, numbers, owners))
    of_texts = []
    for chunk, rows in zip(chunks, owners.split(size), strict=True):
        scores = torch.cat([_score_images(part, *chunk) for part in images.split(size)], 1)  # (m, N)
        of_texts.append(ranks_in_rows(scores, rows, places))
    return Ranks(image_to_text=torch.cat(of_images), text_to_image=torch.cat(of_texts))


def _score_texts(images: Tensor, tokens: Tensor, is_padding: Tensor) -> Tensor:
    """Let n pictures (n, P, Q) score m texts (m, L, Q), → (n, m)."""
    similar = torch.einsum("npq,mlq->nmpl", images, tokens)  # (n, m, P, L)
    return similar.masked_fill(is_padding[:, None], -torch.inf).amax(3).mean(2)


def _score_images(images: Tensor, tokens: Tensor, is_padding: Tensor) -> Tensor:
    """Let m texts (m, L, Q) score n pictures (n, P, Q), → (m, n)."""
    similar = torch.einsum("mlq,npq->mnlp", tokens, images)  # (m, n, L, P)
    best = similar.amax(3).masked_fill(is_padding[:, None], 0.0)  # (m, n, L)
    return best.sum(2) / (~is_padding).sum(1)[:, None]
