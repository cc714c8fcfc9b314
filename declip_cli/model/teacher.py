"""A running average of the image tower that tells the trained one where to look and what to predict."""

import copy

import torch
from torch import Tensor, nn

from declip_cli.model.vision_transformer import VisionTransformer


class Teacher(nn.Module):
    """Copies of an image tower and a head that follow them and are never trained.

    Args:
        tower: to follow.
        head: to follow.

    Source: BYOL, arXiv 2006.07733, equation 1.
    """

    num_updates: Tensor

    def __init__(self, tower: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = copy.deepcopy(tower), copy.deepcopy(head)
        self.requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, tower: nn.Module, head: nn.Module, *, momentum: float) -> None:
        """Keep a share of the own weights and take the rest from those that are followed; all of it the first time."""
        share = torch.where(self.num_updates == 0, 0.0, momentum)  # (), on the device
        own: list[Tensor] = [*self.tower.parameters(), *self.head.parameters()]
        followed: list[Tensor] = [*tower.parameters(), *head.parameters()]
        torch._foreach_mul_(own, share)  # one launch on a GPU instead of hundreds
        torch._foreach_add_(own, list(torch._foreach_mul(followed, 1 - share)))
        self.num_updates += 1
