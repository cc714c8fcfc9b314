"""What training adds to the towers: SimSiam, SimCLR, BYOL, word and masked-language heads, token-wise projections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.distributed import sum_over_ranks

TOKEN_WISE_DIM = 256
"""Width in which FILIP and DeFILIP compare tokens (prototype/model/filip.py)."""
SIMSIAM_WIDTH, SIMCLR_WIDTH = 1024, 4096
"""Widths of hidden layers in the papers (arXiv 2011.10566, 2112.12750)."""
_NEVER = -1e4
"""Logit of what cannot be predicted: its share of a softmax is 0; float16 holds it."""
_COUNTED_AT_ONCE = ("cpu",)
"""Kinds of devices that say how many words they hold without being waited for."""


class SimSiamProjector(nn.Module):
    """Three linear layers with BatchNorm, the last without ReLU, (B, D) → (B, W), of width W = 1,024 by default.

    Source: SimSiam, arXiv 2011.10566; prototype/model/declip.py:33-80.
    """

    def __init__(self, in_dim: int, *, width: int | None = None) -> None:
        super().__init__()
        width = width or SIMSIAM_WIDTH
        self.linear1, self.bn1 = nn.Linear(in_dim, width), nn.BatchNorm1d(width)
        self.linear2, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.linear3, self.bn3 = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """Project embeddings of one view."""
        hidden = self.bn1(self.linear1(embeds)).relu()
        hidden = self.bn2(self.linear2(hidden)).relu()
        out: Tensor = self.bn3(self.linear3(hidden))
        return out


class SimSiamPredictor(nn.Module):
    """A bottleneck, half as wide, that predicts the other view's projection, (B, W) → (B, W).

    Source: SimSiam, arXiv 2011.10566; prototype/model/declip.py:83-130.
    """

    def __init__(self, *, width: int | None = None) -> None:
        super().__init__()
        width = width or SIMSIAM_WIDTH
        bottleneck = max(1, width // 2)
        self.linear1, self.bn1 = nn.Linear(width, bottleneck), nn.BatchNorm1d(bottleneck)
        self.layer2 = nn.Linear(bottleneck, width)

    def forward(self, z: Tensor) -> Tensor:
        """Predict from projections of one view."""
        out: Tensor = self.layer2(self.bn1(self.linear1(z)).relu())
        return out


class SimClrHead(nn.Module):
    """SLIP's three linear layers, BatchNorm and ReLU after the first two, (B, E) → (B, 256), of width 4,096 by default.

    Source: SLIP, arXiv 2112.12750; prototype/model/slip.py of the original, whose third BatchNorm is never applied.
    """

    def __init__(self, in_dim: int, *, width: int | None = None, out_dim: int = 256) -> None:
        super().__init__()
        width = width or SIMCLR_WIDTH
        self.linear1, self.bn1 = nn.Linear(in_dim, width), nn.BatchNorm1d(width)
        self.linear2, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features of one view."""
        hidden = self.bn1(self.linear1(features)).relu()
        hidden = self.bn2(self.linear2(hidden)).relu()
        out: Tensor = self.linear3(hidden)
        return out


class ByolHead(nn.Module):
    """Two linear layers with BatchNorm and ReLU between, (B, E) → (B, 256), of width 4,096 by default.

    Source: BYOL, arXiv 2006.07733, section 3.3.
    """

    def __init__(self, in_dim: int, *, width: int | None = None, out_dim: int = 256) -> None:
        super().__init__()
        width = width or SIMCLR_WIDTH
        self.linear1, self.bn1 = nn.Linear(in_dim, width), nn.BatchNorm1d(width)
        self.linear2 = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features of one view, or predict from its projection."""
        out: Tensor = self.linear2(self.bn1(self.linear1(features)).relu())
        return out


class WordHead(nn.Module):
    """Layer norm and linear map from an image's mean patch to the words of its caption.

    Only words of earlier steps can be predicted: how rare a word is, is not known before. It is counted in captions.

    Args:
        in_dim: E, of the patches.
        num_words: V, size of the vocabulary.

    Source: SuperCLIP, arXiv 2512.14480.
    """

    num_captions: Tensor
    num_with: Tensor

    def __init__(self, in_dim: int, num_words: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(in_dim), nn.Linear(in_dim, num_words)
        nn.init.normal_(self.linear.weight, std=in_dim**-0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("num_captions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_with", torch.zeros(num_words, dtype=torch.int64))

    def forward(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score the words that have been seen.

        On a CPU, K is their number, a small part of V where data are few. Elsewhere it is V, since asking a GPU for
        their number would hold it up, and compiled code wants it to stand still; words not seen then score too low to
        matter.

        Args:
            features: mean of the patches, (B, E).
            words: ids, -1 elsewhere, int64, (B, L).

        Returns:
            Logits (B, K), where among the K each word is, -1 where it is not, (B, L), and the rarity of the K,
            log((captions + 1) / (captions with the word + 1)), 0 of a word not seen, (K,).
        """
        weight: Tensor = self.linear.weight  # (V, E)
        bias: Tensor = self.linear.bias  # (V,)
        is_seen = self.num_with > 0  # (V,)
        rarity = torch.where(is_seen, ((self.num_captions + 1) / (self.num_with + 1)).log(), 0.0)  # (V,)
        is_counted = features.device.type in _COUNTED_AT_ONCE and not torch.compiler.is_compiling()
        if is_counted and is_seen.any():
            seen = is_seen.nonzero()[:, 0]  # (K,)
            positions = torch.full_like(self.num_with, -1).index_put((seen,), torch.arange(len(seen)))
            words = torch.where(words >= 0, positions[words], -1)
            weight, bias, rarity = weight[seen], bias[seen], rarity[seen]
        else:
            bias = bias.masked_fill(~is_seen, _NEVER)
        return F.linear(self.norm(features), weight, bias), words, rarity

    @torch.no_grad()
    def count(self, words: Tensor, is_good: Tensor) -> None:
        """Count the captions of all ranks, (B, L), and those with each word, unless the batch was broken."""
        with_word = torch.zeros(len(self.num_with) + 1, dtype=torch.int64, device=words.device)
        with_word.scatter_add_(0, words.flatten() + 1, torch.ones_like(words).flatten())
        with_word[0] = len(words)  # in place of what is no word
        with_word = sum_over_ranks(with_word * is_good)
        self.num_captions += with_word[0]
        self.num_with += with_word[1:]


def distinct_ids(tokens: Tensor, mask: Tensor) -> Tensor:
    """Keep each id of a text once.

    Args:
        tokens: ids, int64, (B, L).
        mask: True where a token counts, bool, (B, L); those that do not are behind those that do.

    Returns:
        The ids where they stand first, -1 elsewhere, (B, L).
    """
    is_repeated = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2)  # (B, L)
    return tokens.masked_fill(~mask | is_repeated, -1)


class TokenWiseHeads(nn.Module):
    """Linear maps of patches and tokens into the space in which FILIP compares them.

    Source: FILIP, arXiv 2111.07783; prototype/model/filip.py (`image_mapping`, `text_mapping`).
    """

    def __init__(self, image_dim: int, text_dim: int, *, width: int) -> None:
        super().__init__()
        self.image_mapping = nn.Linear(image_dim, width)
        self.text_mapping = nn.Linear(text_dim, width)
