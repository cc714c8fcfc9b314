"""Images and texts compared token by token, for models of the FILIP kind, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from declip_cli.data.dataset import Dataset
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions, Part, encode_shares, take
from declip_cli.evaluate.features import ImageFeatures, map_images
from declip_cli.evaluate.metrics import Ranks, ranks_in_rows
from declip_cli.evaluate.prompts import Prompts
from declip_cli.evaluate.texts import encode_batches
from declip_cli.model.checkpoint import PretrainedModel

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

    def select(self, indices: Tensor) -> "TokenTexts":
        """Take some texts; `indices` int64, (m,)."""
        parts = self.tokens.split(self.lengths.tolist())
        return TokenTexts(torch.cat([parts[index] for index in indices.tolist()]), self.lengths[indices])

    def padded(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of texts first to last - 1, (m, L, Q), and which are none, bool, (m, L)."""
        lengths = self.lengths[first:last]  # (m,)
        start = int(self.lengths[:first].sum())
        rows = self.tokens[start : start + int(lengths.sum())].split(lengths.tolist())
        tokens = pad_sequence(list(rows), batch_first=True)  # (m, L, Q)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]


def encode_image_tokens(model: PretrainedModel, dataset: Dataset, *, options: FeatureOptions) -> ImageFeatures:
    """Encode images patch by patch with the token-wise heads; features of unit length, (N', P, Q)."""
    encoder, side = model.towers, model.image_side_px
    with torch.inference_mode():
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=model.device)
        width = encoder.encode_image_tokens(blank).shape[-1]

    def encode(images: Tensor) -> Tensor:
        return F.normalize(encoder.encode_image_tokens(images).float(), dim=-1).flatten(1)  # (B, P Q)

    found = map_images(model, dataset, encode, label="image tokens", options=options)
    return ImageFeatures(found.features.unflatten(1, (-1, width)), found.kept, found.skipped)


def encode_text_tokens(model: PretrainedModel, texts: Sequence[str], *, options: FeatureOptions) -> TokenTexts:
    """Encode M texts token by token, start and end included, padding omitted; float32 on the CPU."""
    found = encode_shares(len(texts), partial(_encode_tokens, model, texts), options)
    return TokenTexts(found.rows, torch.bincount(found.indices, minlength=len(texts)))


def _encode_tokens(model: PretrainedModel, texts: Sequence[str], own: range, options: FeatureOptions) -> Part:
    """Encode the texts of a share, one row per token."""
    found: dict[int, Tensor] = {}
    encode = model.towers.encode_text_tokens
    for indices, _, (tokens, mask) in encode_batches(model, take(texts, own), encode, options):
        normalized = F.normalize(tokens.float(), dim=-1).cpu()  # (B, L, Q)
        for index, row, is_token in zip(indices.tolist(), normalized, mask.cpu(), strict=True):
            found[index] = row[is_token]  # (L', Q)
    rows = [found[index] for index in range(len(own))]
    lengths = torch.tensor([len(row) for row in rows])  # (M',)
    return Part(torch.cat(rows), torch.tensor(own).repeat_interleave(lengths))


def token_wise_ranks(images: Tensor, texts: TokenTexts, image_ids: Tensor) -> Ranks:
    """Rank right answers by token-wise similarity, both ways.

    An image scores a caption by the best token for each patch, averaged over the patches; a caption scores an
    image by the best patch for each token, averaged over the tokens. Nothing is omitted on either side: the
    restriction to 16 tokens belongs to training.

    Args:
        images: unit length, (N, P, Q).
        texts: captions of these images, M.
        image_ids: the image of each text, int64, (M,).

    Returns:
        The ranks; see `paired_ranks` for ties and images without captions.

    Source: FILIP, arXiv 2111.07783, equations 3 to 5.
    """
    rows_of_images = torch.arange(len(images), device=images.device)  # (N,)
    longest = int(texts.lengths.max())
    size = max(1, int((_CHUNK_SIMILARITIES / (images.shape[1] * longest)) ** 0.5))
    with_text = rows_of_images[torch.isin(rows_of_images, image_ids)]  # (N',)
    chunks = [texts.padded(first, min(first + size, len(texts))) for first in range(0, len(texts), size)]
    of_images = []
    for indices in with_text.split(size):
        scores = torch.cat([_score_texts(images[indices], *chunk) for chunk in chunks], 1)  # (n, M)
        of_images.append(ranks_in_rows(scores, indices, image_ids))
    of_texts = []
    for chunk, rows in zip(chunks, image_ids.split(size), strict=True):
        scores = torch.cat([_score_images(part, *chunk) for part in images.split(size)], 1)  # (m, N)
        of_texts.append(ranks_in_rows(scores, rows, rows_of_images))
    return Ranks(image_to_text=torch.cat(of_images), text_to_image=torch.cat(of_texts))


def _score_texts(images: Tensor, tokens: Tensor, is_padding: Tensor) -> Tensor:
    """Let n images (n, P, Q) score m texts (m, L, Q), → (n, m)."""
    similar = torch.einsum("npq,mlq->npml", images, tokens)  # (n, P, m, L)
    return similar.masked_fill(is_padding, -torch.inf).amax(3).mean(1)


def _score_images(images: Tensor, tokens: Tensor, is_padding: Tensor) -> Tensor:
    """Let m texts (m, L, Q) score n images (n, P, Q), → (m, n)."""
    similar = torch.einsum("mlq,npq->mnlp", tokens, images)  # (m, n, L, P)
    best = similar.amax(3).masked_fill(is_padding[:, None], 0.0)  # (m, n, L)
    return best.sum(2) / (~is_padding).sum(1)[:, None]


@dataclass(frozen=True, slots=True)
class TokenClassifier:
    """Token-wise features of each class."""

    tokens: Tensor
    """Of unit Frobenius norm per class, float32, (C, L, Q)."""
    is_padding: Tensor
    """True where a class has no token, bool, (C, L)."""

    def to(self, device: torch.device) -> "TokenClassifier":
        """Move both tensors to a device."""
        return TokenClassifier(self.tokens.to(device), self.is_padding.to(device))

    def score(self, image_tokens: Tensor, *, chunk_classes: int = 64) -> Tensor:
        """Score images by their patches (B, P, Q), → (B, C): best token for each patch, averaged over patches.

        Source: FILIP's zero-shot evaluation in the original (Sense-GVT/DeCLIP, prototype/solver/filip_solver.py,
            get_logits).
        """
        patches = F.normalize(image_tokens.float(), dim=-1)  # (B, P, Q)
        chunks = zip(self.tokens.split(chunk_classes), self.is_padding.split(chunk_classes), strict=True)
        return torch.cat([_score_texts(patches, *chunk) for chunk in chunks], dim=1)


def build_token_classifier(
    model: PretrainedModel, prompts: Prompts, *, options: FeatureOptions = DEFAULTS
) -> TokenClassifier:
    """Encode the prompts of C classes token by token and average them by class and position, on the CPU.

    Source: protocol of FILIP in the original (Sense-GVT/DeCLIP, prototype/solver/filip_solver.py, evaluate): tokens are
        normalized before the mean, and the mean is divided by its Frobenius norm.
    """
    found = encode_shares(len(prompts.by_class), partial(_sum_tokens, model, prompts), options)
    sums, counts = found.rows[..., :-1], found.rows[..., -1]  # (C, L, Q), (C, L)
    means = sums / counts.clamp(min=1)[..., None]
    norms = means.flatten(1).norm(dim=1)  # (C,)
    longest = int((counts.sum(dim=0) > 0).sum())
    return TokenClassifier((means / norms[:, None, None])[:, :longest], counts[:, :longest] == 0)


def _sum_tokens(model: PretrainedModel, prompts: Prompts, own: range, options: FeatureOptions) -> Part:
    """Add up the unit tokens of each class of a share by position; the last column counts them, (C, L, Q + 1)."""
    prompts = Prompts(tuple(take(prompts.by_class, own)))
    image_ids, sums = prompts.class_ids(), torch.zeros(0)
    encode = model.towers.encode_text_tokens
    for indices, ids, (tokens, mask) in encode_batches(model, prompts.flat(), encode, options):
        if not len(sums):
            sums = torch.zeros(len(own), model.context_length, tokens.shape[-1] + 1)
        weights = mask.float().cpu()[..., None]  # (B, L, 1)
        normalized_tokens = F.normalize(tokens.float(), dim=-1).cpu() * weights  # (B, L, Q)
        sums[:, : ids.shape[1]].index_add_(0, image_ids[indices], torch.cat([normalized_tokens, weights], dim=-1))
    return Part(sums, torch.tensor(own))
