"""What training and sampling need of any model and its data."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.process.samplers import Clip


class DiffusionModel(nn.Module, ABC):
    """A network that predicts the noise, and the forward process that it is trained on."""

    alphas_cumprod: Tensor  # [T]

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("alphas_cumprod", alphas_cumprod)

    @abstractmethod
    def predict(self, xt: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of eps, like xt [batch, ...]; t is [batch], whole or fractional."""

    def predict_for(self, xt: Tensor, t: Tensor) -> Tensor:
        """Calls `predict` for tensors that may be on another device than the model; the answer is where xt is."""
        device = self.alphas_cumprod.device
        return self.predict(xt.to(device), t.to(device)).to(xt.device)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM, equation 4)."""
        abar = self.alphas_cumprod[t].to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def forward(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each example, [batch]: mean squared error of the predicted noise (DDPM, equation 14)."""
        error = self.predict(self.q_sample(x0, t, eps), t).float() - eps
        return error.square().flatten(1).mean(1)


class Experiment(ABC):
    """A model with its data: everything that distinguishes one training from another."""

    sample_shape: tuple[int, ...]
    """Shape of one example."""
    clip: Clip | None
    """The range of the data where it is bounded."""

    @abstractmethod
    def build_model(self) -> DiffusionModel:
        """A model with fresh weights, drawn from torch's global generator."""

    @abstractmethod
    def batch(self, seed: int, step: int, start: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        """x0 [stop - start, *sample_shape]: examples [start, stop) of the global batch of this step (from 1)."""

    @abstractmethod
    def held_out(self) -> Tensor | None:
        """x0 [n, *sample_shape] on the host that no training sees, always the same; None if the data have no such."""

    @abstractmethod
    def to_array(self, x0: Tensor) -> NDArray[Any]:
        """Samples as they are written to files, [n, ...]."""

    @abstractmethod
    def draw_samples(self, samples: NDArray[Any], path: Path) -> None:
        """A picture of samples as `to_array` gave them."""

    @abstractmethod
    def report(self, model: DiffusionModel, folder: Path) -> list[str]:
        """Draws the figures of a trained model into `folder`; returns lines that say how good it is."""

    @abstractmethod
    def sketch(self, model: DiffusionModel, folder: Path) -> None:
        """Draws quick pictures of what the model has learnt so far into `folder`, always from the same noise."""

    def loss_floor(self) -> float | None:
        """The smallest loss that any network can reach, where it is known."""
        return None


def timesteps(uniforms: NDArray[np.float64], num_timesteps: int) -> NDArray[np.int64]:
    """Turns numbers on [0, 1) into timesteps 0..T-1, [n]."""
    return (uniforms * num_timesteps).astype(np.int64)
