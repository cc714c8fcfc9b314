"""A running average of the weights."""

import copy

import torch
from torch import Tensor

from declip_cli.model.clip import DualEncoder


class WeightAverage:
    """Exponential moving average of an encoder's parameters and buffers.

    Args:
        encoder: what is averaged.
        decay: share of the average kept per step; early steps use (1 + n) / (10 + n) where that is less.
    """

    def __init__(self, encoder: DualEncoder, *, decay: float) -> None:
        self._decay = decay
        self.num_updates = 0
        self.state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}

    @torch.no_grad()
    def update(self, encoder: DualEncoder) -> None:
        """Take in the weights after a step."""
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, values = [], []
        for name, value in encoder.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)  # one launch on a GPU instead of hundreds

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Go on from a saved average."""
        self.num_updates = num_updates
        for name, value in self.state.items():
            value.copy_(state[name])

    def averaged(self, encoder: DualEncoder) -> DualEncoder:
        """Make a copy of the encoder that has the average for weights."""
        other = copy.deepcopy(encoder)
        other.load_state_dict(self.state)
        return other
