"""What training adds to the towers: SimSiam, SimCLR and masked-language heads, token-wise projections."""

from torch import Tensor, nn

TOKEN_WISE_DIM = 256
"""Width in which FILIP and DeFILIP compare tokens (prototype/model/filip.py)."""


class SimSiamProjector(nn.Module):
    """Three linear layers with BatchNorm, the last without ReLU, (B, D) → (B, 1024).

    Source: SimSiam, arXiv 2011.10566; prototype/model/declip.py:33-80.
    """

    def __init__(self, in_dim: int, *, width: int = 1024) -> None:
        super().__init__()
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
    """A bottleneck that predicts the other view's projection, (B, 1024) → (B, 1024).

    Source: SimSiam, arXiv 2011.10566; prototype/model/declip.py:83-130.
    """

    def __init__(self, *, width: int = 1024, bottleneck: int = 512) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(width, bottleneck), nn.BatchNorm1d(bottleneck)
        self.layer2 = nn.Linear(bottleneck, width)

    def forward(self, z: Tensor) -> Tensor:
        """Predict from projections of one view."""
        out: Tensor = self.layer2(self.bn1(self.linear1(z)).relu())
        return out


class SimClrHead(nn.Module):
    """SLIP's three linear layers, BatchNorm and ReLU after the first two, (B, E) → (B, 256).

    Source: SLIP, arXiv 2112.12750; prototype/model/slip.py of the original, whose third BatchNorm is never applied.
    """

    def __init__(self, in_dim: int, *, width: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(in_dim, width), nn.BatchNorm1d(width)
        self.linear2, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features of one view."""
        hidden = self.bn1(self.linear1(features)).relu()
        hidden = self.bn2(self.linear2(hidden)).relu()
        out: Tensor = self.linear3(hidden)
        return out


class TokenWiseHeads(nn.Module):
    """Linear maps of patches and tokens into the space in which FILIP compares them.

    Source: FILIP, arXiv 2111.07783; prototype/model/filip.py (`image_mapping`, `text_mapping`).
    """

    def __init__(self, image_dim: int, text_dim: int, *, width: int) -> None:
        super().__init__()
        self.image_mapping = nn.Linear(image_dim, width)
        self.text_mapping = nn.Linear(text_dim, width)
