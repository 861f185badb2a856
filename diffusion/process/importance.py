"""Importance sampling of timesteps: more of those that teach much, with weights that leave the loss what it is."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.model import timesteps


class Importance:
    """Draws timesteps in proportion to alpha_bar_t^power.

    A loss that is multiplied by its weight has the same mean as one of timesteps that are drawn alike, and a smaller
    variance: where hardly anything of x_0 is left, eps can be read off x_t, so gradients are small, and with the
    linear schedule that is half of all timesteps.
    """

    weights: Tensor
    """1 / (T p(t)) for each timestep, [T]."""

    def __init__(self, alphas_cumprod: Tensor, power: float) -> None:
        """`power` 0 draws all timesteps alike."""
        density = alphas_cumprod.cpu().double().numpy() ** power
        self._is_uniform = power == 0
        self._cumulative = density.cumsum() / density.sum()
        self.weights = torch.from_numpy((density.mean() / density).astype(np.float32))

    def timesteps(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """Turns numbers on [0, 1) into timesteps 0..T-1, [n]; stratified ones stay so."""
        num_timesteps = len(self._cumulative)
        if self._is_uniform:
            return timesteps(uniforms, num_timesteps)
        # The last sum may be rounded to less than the largest number that is drawn.
        return np.searchsorted(self._cumulative, uniforms, side="right").clip(max=num_timesteps - 1)
