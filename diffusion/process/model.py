"""What training and sampling need of any model and its data."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.process.cuda_graphs import in_one_launch
from diffusion.process.randomness import Stream, uniform
from diffusion.process.samplers import Clip, Denoiser


class DiffusionModel(nn.Module, ABC):
    """A network that predicts the noise, and the forward process that it is trained on."""

    alphas_cumprod: Tensor  # [T]

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, num_classes: int = 0) -> None:
        """With `num_classes`, the network takes the class of each example [batch] after xt and t."""
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.register_buffer("alphas_cumprod", alphas_cumprod)

    @abstractmethod
    def predict(self, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        """The network's estimate of eps, like xt [batch, ...]; t is [batch], whole or fractional.

        `classes` [batch] is for networks with classes: 0 to num_classes - 1, or num_classes for none, as for all of
        them where nothing is given.
        """

    def predict_for(self, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        """Calls `predict` for tensors that may be on another device than the model; the answer is where xt is."""
        return self._moved(self.predict, xt, t, classes)

    def predict_often(self) -> Callable[..., Tensor]:
        """Returns a `predict_for` for many calls with one shape, each of which a GPU gets in one launch."""
        on_gpu = self.alphas_cumprod.device.type == "cuda"
        # What the figures look like does not depend on how their numbers were launched, so nothing needs to be said.
        evaluate = in_one_launch(self.predict, say=lambda text: None) if on_gpu else self.predict
        return partial(self._moved, evaluate)

    def _moved(self, evaluate: Callable[..., Tensor], xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        """Calls it with tensors on the model's device; the answer is where xt is."""
        device = self.alphas_cumprod.device
        told = () if classes is None else (classes.to(device),)
        return evaluate(xt.to(device), t.to(device), *told).to(xt.device)

    def denoiser(self, clip: Clip | None) -> Denoiser:
        """What samplers take; the schedule is on the host, whose single numbers they read."""
        return Denoiser(self.predict_for, self.alphas_cumprod.double().cpu(), clip)

    def told(self, xt: Tensor, classes: Tensor | None) -> tuple[Tensor, ...]:
        """What the network takes after xt and t: nothing, or the class of each example."""
        if not self.num_classes:
            return ()
        return (torch.full((len(xt),), self.num_classes, device=xt.device) if classes is None else classes,)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM, equation 4)."""
        abar = self.alphas_cumprod[t].to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def forward(self, x0: Tensor, t: Tensor, eps: Tensor, classes: Tensor | None = None) -> Tensor:
        """The loss of each example, [batch]: mean squared error of the predicted noise (DDPM, equation 14)."""
        # In fp32: autocast makes the prediction bf16, and 8 bits of a mantissa are too few for a sum over all pixels.
        error = self.predict(self.q_sample(x0, t, eps), t, classes).float() - eps
        return error.square().flatten(1).mean(1)


class Experiment(ABC):
    """A model with its data: everything that distinguishes one training from another."""

    sample_shape: tuple[int, ...]
    """Shape of one example."""
    clip: Clip | None
    """The range of the data where it is bounded."""
    num_classes: int = 0
    """Classes that the network is told; 0 if it is told none."""
    class_dropout: float = 0.0
    """Share of the examples whose class it is not told."""

    @abstractmethod
    def build_model(self) -> DiffusionModel:
        """A model with fresh weights, drawn from torch's global generator."""

    @abstractmethod
    def batch(self, seed: int, step: int, start: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        """x0 [stop - start, *sample_shape]: examples [start, stop) of the global batch of this step (from 1)."""

    def classes(self, seed: int, step: int, start: int, stop: int, batch_size: int) -> NDArray[np.int64]:
        """The classes [stop - start] of the same examples, from 0; asked for if the network is told them."""
        raise NotImplementedError

    def told(self, seed: int, step: int, start: int, stop: int, batch_size: int) -> tuple[NDArray[np.int64], ...]:
        """What the network is told of the same examples in training, besides x_t and t: nothing, or their classes.

        For some of them, drawn by counter, that is `num_classes`, which stands for no class.
        """
        if not self.num_classes:
            return ()
        return (self.with_dropout(self.classes(seed, step, start, stop, batch_size), seed, step, start),)

    def with_dropout(self, classes: NDArray[np.int64], seed: int, step: int, start: int) -> NDArray[np.int64]:
        """The classes [n] of examples from `start` on as the network is told them."""
        dropped = uniform(seed, Stream.CLASS_DROPOUT, step, start, start + len(classes)) < self.class_dropout
        return np.where(dropped, self.num_classes, classes)

    @abstractmethod
    def held_out(self) -> tuple[Tensor, ...]:
        """x0 [n, *sample_shape] on the host that no training sees, always the same.

        If the network is told classes, these [n] come last, left out as often as in training: else the loss of these
        examples would not be comparable with that of the training's.
        """

    @abstractmethod
    def to_array(self, x0: Tensor) -> NDArray[Any]:
        """Samples as they are written to files, [n, ...]."""

    @abstractmethod
    def draw_samples(self, samples: NDArray[Any], path: Path, classes: NDArray[np.int64] | None = None) -> None:
        """A picture of samples as `to_array` gave them, and of these classes [n]."""

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
    # Even the largest float64 below 1, times T, is rounded to less than T.
    return (uniforms * num_timesteps).astype(np.int64)
