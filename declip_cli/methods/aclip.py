"""A-CLIP: half of the patches, those that a running average of the image tower attends to (arXiv 2212.08653)."""

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import MethodConfig, TextView, Views
from declip_cli.errors import ChoiceError
from declip_cli.methods.base import Method, Term, embeddings_of
from declip_cli.methods.terms import byol_loss, simclr_loss
from declip_cli.model.clip import DualEncoder
from declip_cli.model.heads import ByolHead, SimClrHead
from declip_cli.model.teacher import Teacher
from declip_cli.model.vision_transformer import VisionTransformer

_SMALLEST_SIDE_OF_BLOCKS = 8
"""Patches along an image from which on they are kept or left out in blocks of 2 × 2."""


class AClip(Method):
    """CLIP and self-supervision on two masked views; the teacher sees the whole image."""

    default_weights: ClassVar[dict[str, float]] = {"clip": 1.0, "simclr": 1.0, "byol": 2.0}
    options: ClassVar[frozenset[str]] = Method.options | {
        "head_width",
        "simclr_temperature",
        "kept_patches",
        "teacher_momentum",
    }

    def __init__(self, encoder: DualEncoder, config: MethodConfig) -> None:
        super().__init__(encoder, config)
        tower = encoder.visual
        if not isinstance(tower, VisionTransformer):
            raise ChoiceError(
                "method aclip encodes the patches that a class token attends to; a ResNet has no class token",
                remedy="--arch vit-b16, or another vision transformer",
            )
        self.projector: nn.Module = nn.Identity()
        if self.is_active("byol"):
            self.projector = projector = ByolHead(tower.feature_dim, width=config.head_width)
            self.predictor = ByolHead(projector.linear2.out_features, width=config.head_width)
        self.teacher = Teacher(tower, self.projector)
        if self.is_active("simclr"):
            self.simclr_head = SimClrHead(tower.feature_dim, width=config.head_width)

    @property
    def views(self) -> Views:
        """Two strong views, and the whole image for the teacher; the captions themselves."""
        texts: tuple[TextView, ...] = ("plain",)
        return Views(images=("augmented", "augmented", "whole"), texts=texts * self.config.captions)

    def before_step(self, share: float) -> None:
        """Let the teacher follow, ever more slowly."""
        momentum = 1 - (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * share)) / 2
        self.teacher.follow(self.encoder.visual, self.projector, momentum=momentum)

    @torch.no_grad()
    def prepare(self, batch: Batch, *, size: int) -> Batch:
        """Let the teacher describe the whole images, so many at a time, and choose the patches of both views."""
        pixels = self.encoder.pixel_mean, self.encoder.pixel_std
        parts = [self.teacher.tower.attend(part, *pixels) for part in batch.images[:, 2].split(size)]
        scores = torch.cat([part for _, part in parts])  # (B, P)
        kept = choose_patches(scores_in_views(scores, batch.boxes, num_views=2), share=self.config.kept_patches)
        return replace(batch, kept_patches=kept, whole_features=torch.cat([whole.features for whole, _ in parts]))

    def embed(self, batch: Batch) -> Embeddings:
        """Encode the patches of both views that the teacher has chosen, and the captions."""
        if batch.kept_patches is None:
            batch = self.prepare(batch, size=len(batch))
        assert batch.whole_features is not None
        images = self.encode_images(batch.images[:, :2], batch.kept_patches)
        features = [*(view.features for view in images), batch.whole_features]
        return embeddings_of(
            batch,
            images=self.project_images(images),  # (B, 2, D)
            texts=self.project_texts(self.encode_texts(batch), batch.tokens),  # (B, T, D)
            image_features=torch.stack(features, dim=1),  # (B, 3, E)
            **self.word_fields(images[0], batch),
        )

    def terms(self) -> dict[str, Term]:
        """Match both views with the texts and with each other, and predict what the teacher sees."""
        return {
            "clip": partial(self.clip_term, num_images=2, num_texts=self.config.captions),
            "simclr": self.simclr_term,
            "byol": self.byol_term,
        }

    def simclr_term(self, embeddings: Embeddings) -> Tensor:
        """Distinguish the other view of an image from all views of all images, in nats, ()."""
        views = embeddings.image_features[:, :2]
        return simclr_loss(views, self.simclr_head, temperature=self.config.simclr_temperature)

    def byol_term(self, embeddings: Embeddings) -> Tensor:
        """Predict the teacher's projection of the whole image from both views, in [0, 4], ()."""
        views, whole = embeddings.image_features.split([2, 1], dim=1)
        with torch.no_grad():
            target = self.teacher.head(whole[:, 0])
        return byol_loss(views, target, self.projector, self.predictor)


def scores_in_views(scores: Tensor, boxes: Tensor | None, *, num_views: int) -> Tensor:
    """Read the scores of an image's patches at the places of the patches of its views.

    Args:
        scores: of the patches of the whole image, row by row of a square, (B, P).
        boxes: of the views as `Batch` has them, (B, V', 4); None: each shows the whole.
        num_views: V, the first of them.

    Returns:
        The scores in the middle of each view's patches, bilinear between those of the image, (B, V, P).
    """
    side = math.isqrt(scores.shape[1])
    if boxes is None:
        boxes = scores.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(scores), num_views, 4)
    left, top, right, bottom = boxes[:, :num_views, :, None].unbind(2)  # (B, V, 1) each
    middles = (torch.arange(side, device=scores.device) + 0.5) / side  # (G,)
    x, y = left + (right - left) * middles, top + (bottom - top) * middles  # (B, V, G) each
    places = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), dim=4)  # (B, V, G, G, 2)
    image = scores.unflatten(1, (1, side, side))  # (B, 1, G, G)
    found = F.grid_sample(image, (2 * places - 1).flatten(1, 2), padding_mode="border", align_corners=False)
    return found.view(len(scores), num_views, -1)


def choose_patches(scores: Tensor, *, share: float) -> Tensor:
    """Keep the blocks of patches with the highest scores: 2 × 2, or single patches where there are few or odd many.

    Args:
        scores: of the patches, row by row of a square, (…, P).
        share: of the blocks, rounded up, in (0, 1].

    Returns:
        Places of the kept patches, int64, (…, K).

    Source: A-CLIP, arXiv 2212.08653, section 3.1: 25 of 49 blocks of 14 × 14 patches.
    """
    side = math.isqrt(scores.shape[-1])
    block = 2 if side % 2 == 0 and side >= _SMALLEST_SIDE_OF_BLOCKS else 1
    num = side // block  # along a side
    means = scores.unflatten(-1, (num, block, num, block)).mean((-3, -1)).flatten(-2)  # (…, num²)
    best = means.topk(math.ceil(share * num**2)).indices.sort().values  # (…, K / block²)
    first = best // num * block * side + best % num * block
    steps = torch.arange(block, device=scores.device)
    within = (steps[:, None] * side + steps).flatten()  # (block²,)
    places: Tensor = (first[..., None] + within).flatten(-2)
    return places
