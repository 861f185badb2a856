"""Which noise levels a training draws, and how much the loss of each counts."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.model import timesteps
from diffusion.process.schedules import log_snr

ALIKE = 0.1
"""The share of timesteps that are drawn alike in any case. A log-normal distribution would hardly ever draw the first
ones, on which likelihoods rest, nor the last ones, where samples begin."""


class NoiseLevels:
    """The timesteps of training examples, and the weight of the loss of eps at each.

    By default all timesteps are drawn alike and count alike (DDPM, equation 14). `log_normal`, the mean and standard
    deviation of ln(sigma / alpha), draws most of them where an image is half hidden, and the loss is that of
    v = alpha eps - sigma x_0: the distribution and the weights of EDM (Karras et al. 2022, table 1) for data of
    standard deviation 1, apart from `ALIKE`.
    """

    weights: Tensor
    """[T]"""

    def __init__(self, alphas_cumprod: Tensor, log_normal: tuple[float, float] | None) -> None:
        abar = alphas_cumprod.cpu().double()
        self.weights = torch.ones(len(abar))
        self._cumulative: NDArray[np.float64] | None = None
        if log_normal is None:
            return
        mean, std = log_normal
        level = -log_snr(abar).numpy()  # ln(sigma / alpha)
        density = np.exp(-0.5 * ((level - mean) / std) ** 2) * np.gradient(level)
        share = (1 - ALIKE) * density / density.sum() + ALIKE / len(level)
        self._cumulative = share.cumsum()
        # An error of v is one of eps over alpha: eps = sigma x_t + alpha v (Salimans & Ho 2022, appendix D).
        self.weights = (1 / abar).float()

    def timesteps(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """Turns numbers on [0, 1) into timesteps 0..T-1, [n]; stratified ones stay so."""
        if self._cumulative is None:
            return timesteps(uniforms, len(self.weights))
        # The last sum may be rounded to less than the largest number that is drawn.
        return np.searchsorted(self._cumulative, uniforms, side="right").clip(max=len(self.weights) - 1)
