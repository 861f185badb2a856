"""The exponential moving average of the weights, which is what samples are drawn from."""

import copy

import torch
from torch import Tensor, nn

from jobs.flat import Flat


def decay_at(step: int, decay: float) -> float:
    """The decay of a step (from 1): small at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """A copy of a network that follows its `Flat` weights; buffers are copied."""

    def __init__(self, network: nn.Module, weights: Tensor, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        self._averages, self._weights = Flat(self.network).weights, weights
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the weights after optimizer update `step`."""
        self._averages.lerp_(self._weights, 1 - decay_at(step, self._decay))
        for average, buffer in self._buffers:
            average.copy_(buffer)
