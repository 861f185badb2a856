"""Bits per dimension of images under the discrete variational bound (Ho et al. 2020, equation 5 and section 3.3).

-log p(x) <= KL(q(x_T | x) || N(0, I)) + sum_{0 < t < T} KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)) - log p(x | x_0),
in bits per pixel. t is counted from 0 as everywhere here: x_0 is the least noisy latent, the paper's x_1.

Each image draws its own noise, as a function of (seed, index of the image, t), and the network sees full batches of one
image at a time: whichever process computes a share of the images gets the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diffusion.process.randomness import Stream, normal, uniform
from diffusion.process.samplers import Denoiser, Predict
from diffusion.statistics.bootstrap import Floats

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Bound:
    """The terms of the bound for each of n images.

    The sum over t runs over `edges` [strata + 1]: stratum s holds the timesteps [edges[s], edges[s + 1]), of which one
    stands for all. `squared_error` is the loss of the predicted noise there, its first column that at t = 0.
    """

    edges: NDArray[np.int64]
    prior: Floats  # [n]
    transitions: Floats  # [n, strata]
    reconstruction: Floats  # [n]
    squared_error: Floats  # [n, 1 + strata]

    @property
    def total(self) -> Floats:
        """The bound of each image, [n]."""
        return self.prior + self.transitions.sum(1) + self.reconstruction

    @staticmethod
    def join(shares: "Sequence[Bound]") -> "Bound":
        """All images of several shares, which are of the same strata."""
        names = ("prior", "transitions", "reconstruction", "squared_error")
        return Bound(shares[0].edges, *(np.concatenate([getattr(share, name) for share in shares]) for name in names))


def mean_and_error(values: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean over images of terms [n, ...] and its standard error, with what the drawn t and x_t add to it."""
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 images; got {len(values)}")
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def strata(timesteps: int, number: int) -> NDArray[np.int64]:
    """Edges [number + 1] that split the timesteps 1..T-1, finely at small t where the terms are large and change fast.

    T - 1 are the whole sum over t. Fewer are faster and as unbiased, with a larger error; 63 and t = 0 fill one batch.
    """
    if not 1 <= number < timesteps:
        raise ValueError(f"strata must lie between 1 and {timesteps - 1}, one less than timesteps; got {number}")
    edges = np.geomspace(1, timesteps, number + 1).round().astype(np.int64)
    # Rounding may have made neighbours equal: each edge becomes at least one more than the edge before it.
    return np.maximum.accumulate(edges - np.arange(number + 1)) + np.arange(number + 1)


@torch.inference_mode()
def bound(denoiser: Denoiser, images: NDArray[np.uint8], *, first: int, seed: int, edges: NDArray[np.int64]) -> Bound:
    """The bound for images [n, height, width, channels], whose indices are first, first + 1, ...

    `edges` come from `strata`. ValueError for images that are not uint8.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be uint8 [n, height, width, channels]; got {images.dtype} {list(images.shape)}")
    process = _Process.of(denoiser.alphas_cumprod)
    x0 = exactly_scaled(images)
    rows = [_terms(denoiser, x, process, first + i, seed, edges) for i, x in enumerate(x0)]
    transitions, reconstruction, squared_error = (np.array(column) for column in zip(*rows, strict=True))
    return Bound(edges, _prior(x0, process.abar[-1]), transitions, reconstruction, squared_error)


def exactly_scaled(images: NDArray[np.uint8]) -> Tensor:
    """Images [n, height, width, channels] as the model's x0 [n, channels, height, width] in [-1, 1], in float64."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1


def log_likelihood(x0: Tensor, mean: Tensor, std: float) -> Tensor:
    """log p(x0 | mean) for each pixel: the Gaussian's mass on x0's 256th, the outer ones reaching to infinity (eq. 13).

    It takes log Phi on the side where Phi is small, so that no mass underflows to 0.
    """
    centre, half = (x0 - mean) / std, 1 / 255 / std
    near, far = (torch.special.log_ndtr(-centre.abs() + sign * half) for sign in (1, -1))
    # log(Phi(near) - Phi(far)) = log Phi(near) + log(1 - Phi(far) / Phi(near)).
    inside = near + torch.log1p(-torch.exp(far - near))
    lowest, highest = torch.special.log_ndtr(centre + half), torch.special.log_ndtr(-centre + half)
    # As in the paper's code: x0 is exact to rounding alone, and the grey levels beside -1 and 1 are 1 / 127.5 away.
    return torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inside))


def decoder_std(alphas_cumprod: Tensor) -> float:
    """The standard deviation of p(x | x_0), which is that of the reverse step from t = 1."""
    return float(_Process.of(alphas_cumprod).variance[0].sqrt())


@dataclass(frozen=True)
class _Process:
    """The constants of each timestep that the terms need, each [T] in float64."""

    abar: Tensor
    weight: Tensor
    """The coefficient of x0 in the mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, equation 7)."""
    variance: Tensor
    """That of q(x_{t-1} | x_t, x0), which the reverse steps have too (Ho et al. 2020, section 3.2)."""

    @staticmethod
    def of(alphas_cumprod: Tensor) -> "_Process":
        abar = alphas_cumprod.double().cpu()
        before = F.pad(abar[:-1], (1, 0), value=1.0)
        betas = 1 - abar / before
        posterior = betas * (1 - before) / (1 - abar)
        # At t = 0, where q has no variance, the decoder takes that of t = 1, as the paper's code does.
        variance = torch.cat([posterior[1:2], posterior[1:]])
        return _Process(abar, before.sqrt() * betas / (1 - abar), variance)


def _terms(
    denoiser: Denoiser, x0: Tensor, process: _Process, index: int, seed: int, edges: NDArray[np.int64]
) -> tuple[Floats, float, Floats]:
    """Transitions [strata], reconstruction and squared error [1 + strata] of one image x0 [channels, height, width]."""
    sizes = np.diff(edges)
    drawn = edges[:-1] + (uniform(seed, Stream.TIMESTEP, index, 0, len(sizes)) * sizes).astype(np.int64)
    t = torch.from_numpy(np.concatenate([[0], drawn]))
    # All up to the last t are drawn, then some taken: the noise of an image at t does not depend on the strata.
    noise = torch.from_numpy(normal(seed, Stream.BOUND, index, 0, int(t[-1]) + 1, tuple(x0.shape)))[t].double()
    a, b = (value[t].sqrt().view(-1, 1, 1, 1) for value in (process.abar, 1 - process.abar))
    xt = a * x0 + b * noise
    eps = _predicted(denoiser.predict, xt, t)
    x0_predicted = denoiser.clipped((xt - b * eps) / a)
    error = (x0 - x0_predicted)[1:].square().flatten(1).mean(1)
    weight, variance = (value[t[1:]] for value in (process.weight, process.variance))
    # KL of two Gaussians of the same variance whose means differ by weight * (x0 - x0_predicted).
    kl = 0.5 * weight**2 * error / variance
    reconstruction = -log_likelihood(x0, x0_predicted[0], float(process.variance[0].sqrt())).mean()
    squared_error = (eps - noise).square().flatten(1).mean(1)
    # One timestep stands for all of its stratum, so its term counts as often as the stratum has timesteps.
    return sizes * (kl / math.log(2)).numpy(), float(reconstruction) / math.log(2), squared_error.numpy()


def _predicted(predict: Predict, xt: Tensor, t: Tensor) -> Tensor:
    """Predicts eps in float64 for xt [n, ...], in full batches; the last one is filled up with its last example."""
    filled = torch.arange(-(-len(t) // _BATCH_SIZE) * _BATCH_SIZE).clamp(max=len(t) - 1)
    parts = [predict(xt[i].float(), t[i]).double() for i in filled.split(_BATCH_SIZE)]
    return torch.cat(parts)[: len(t)]


def _prior(x0: Tensor, abar: Tensor) -> Floats:
    """KL(q(x_T | x0) || N(0, I)), [n]."""
    # 0.5 (mean^2 + variance - 1 - log variance); variance - 1 is -abar, whose digits 1 - abar would lose.
    kl = 0.5 * (abar * x0.square() - abar - torch.log1p(-abar))
    return (kl.flatten(1).mean(1) / math.log(2)).numpy()
