"""The exponential moving average of the weights, which is what samples are drawn from."""

import copy

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """The decay of a step (from 1): small at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """A copy of a network that follows its weights; buffers are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        self._averages: list[Tensor] = list(self.network.parameters())
        self._weights = [weight.detach() for weight in network.parameters()]
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the weights after optimizer update `step`."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay_at(step, self._decay))
        for average, buffer in self._buffers:
            average.copy_(buffer)
