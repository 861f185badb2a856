"""The exponential moving average of the weights; samples are drawn with it."""

import copy

import torch
from torch import Tensor, nn

from jobs.train.flat_weights import Flat


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of a step (from 1). It is small at first, so that the initial weights are soon forgotten."""
    # The warm-up of TensorFlow's ExponentialMovingAverage.
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """A copy of a network whose weights are averages of its `Flat` weights; buffers are copied as they are."""

    def __init__(self, network: nn.Module, weights: Tensor) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._flat, self._weights = Flat(self.network), weights
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, share: Tensor) -> None:
        """Moves the averages towards the weights; `share`, a tensor [], is 1 minus the decay of the step."""
        self._flat.weights.lerp_(self._weights, share)
        for average, buffer in self._buffers:
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns a copy of the network's state, in a CPU's memory."""
        return self._flat.state_dict(self.network)
