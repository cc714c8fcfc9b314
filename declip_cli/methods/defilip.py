"""DeFILIP: DeCLIP's supervision and FILIP's token-wise loss together (arXiv 2203.05796)."""

from typing import ClassVar

from declip_cli.config import Views
from declip_cli.methods.base import Term
from declip_cli.methods.declip import DeClip
from declip_cli.methods.token_wise import TokenWise


class DeFilip(TokenWise, DeClip):
    """The token-wise loss is on the first image and the first text only, as in the original."""

    default_weights: ClassVar[dict[str, float]] = DeClip.default_weights | {"filip": 0.2}
    options: ClassVar[frozenset[str]] = DeClip.options | TokenWise.options

    @property
    def views(self) -> Views:
        """DeCLIP's; texts at full length where padding is scored."""
        views = super().views
        return Views(images=views.images, texts=views.texts, pad_to_context=bool(self.config.score_padding))

    def terms(self) -> dict[str, Term]:
        """Add the token-wise loss to DeCLIP's terms."""
        return super().terms() | {"filip": self.filip_term}
