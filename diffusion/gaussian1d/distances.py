"""Distances of a model and its samples from the exact answer."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.samplers import Predict


@torch.inference_mode()
def excess_loss(predict: Predict, mixture: Mixture, abar: Tensor, points: int = 401) -> Tensor:
    """E (eps_theta - eps*)^2 at each timestep, [T] in float64, by quadrature over p_t: what training can still win."""
    x, weight = mixture.quadrature(abar, points)  # [T, points]
    exact = mixture.eps(x, abar[:, None])
    t = torch.arange(len(abar))[:, None].expand_as(x)
    errors = []
    for rows in torch.arange(len(abar)).split(16):  # about 6,000 evaluations at once, where a CPU is fastest
        xt = x[rows].reshape(-1, 1).float()
        eps = predict(xt, t[rows].reshape(-1)).double().reshape(len(rows), -1)
        errors.append((weight[rows] * (eps - exact[rows]) ** 2).sum(-1))
    return torch.cat(errors)


def wasserstein1(x: Tensor, mixture: Mixture) -> float:
    """W1 between the samples x [n] and the mixture: the exact area between the two quantile functions, at any n.

    The i-th smallest sample x_i is compared with the exact quantiles F^-1(u) from u0 = (i - 1) / n to u1 = i / n. They
    are below x_i up to c, which is F(x_i) clamped to [u0, u1], and above it from there on. So its area is

        int_u0^c (x_i - F^-1) du + int_c^u1 (F^-1 - x_i) du = x_i (2c - u0 - u1) + P(u0) + P(u1) - 2 P(c)

    where P(u), the integral of F^-1 from 0 to u, is the mixture's `partial_mean` at F^-1(u).
    """
    n, area = len(x), 0.0
    ordered = x.double().sort().values
    for i in torch.arange(n).split(500_000):  # the quantiles of so many samples take 100 MB
        edges = torch.cat([i, i[-1:] + 1]).double() / n  # all u0, and the last u1
        # The outermost edges are 0 and 1. Bisection ends there at finite places, where float64 sees no mass beyond.
        quantiles = mixture.quantile(edges)
        partial = mixture.partial_mean(quantiles)  # P at the edges
        crossing = torch.minimum(torch.maximum(mixture.cdf(ordered[i]), edges[:-1]), edges[1:])  # c
        at = torch.minimum(torch.maximum(ordered[i], quantiles[:-1]), quantiles[1:])  # F^-1(c)
        area += float((ordered[i] * (2 * crossing - edges[:-1] - edges[1:])).sum())
        area += float((partial[:-1] + partial[1:] - 2 * mixture.partial_mean(at)).sum())
    return area


def wasserstein1_floor(mixture: Mixture, n: int) -> float:
    """E W1(n exact samples, mixture) ~ sqrt(2 / (pi n)) integral sqrt(F (1 - F)) dx (del Barrio et al. 1999)."""
    x = mixture.quantile(torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64))
    grid = torch.linspace(float(x[0]), float(x[1]), 20_001, dtype=torch.float64)
    f = mixture.cdf(grid)
    # F may be rounded to more than 1, and a negative number has no root.
    return math.sqrt(2 / (math.pi * n)) * float(torch.trapezoid((f * (1 - f)).clamp(min=0).sqrt(), grid))


def kolmogorov_smirnov(x: Tensor, mixture: Mixture) -> float:
    """The largest distance between the empirical and the exact distribution function."""
    n = len(x)
    f = mixture.cdf(x.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    # The empirical function jumps at each sample, so the gap is largest right at one or right before it.
    return float(torch.maximum(steps[1:] - f, f - steps[:-1]).max())


def kolmogorov_smirnov_floor(n: int) -> float:
    """E KS(n exact samples, truth) ~ sqrt(pi / 2) ln 2 / sqrt(n), the mean of Kolmogorov's distribution."""
    return math.sqrt(math.pi / (2 * n)) * math.log(2)


def histogram_kl(x: Tensor, mixture: Mixture, bins: int) -> float:
    """KL(histogram of x [n] || mixture) in nats, over bins of equal probability; exact samples: ~ (bins - 1) / 2n."""
    edges = mixture.quantile(torch.arange(1, bins, dtype=torch.float64) / bins)
    # searchsorted warns of values that are not contiguous, as a column of samples is.
    counts = torch.bincount(torch.searchsorted(edges, x.double().contiguous()), minlength=bins)
    return float(kl_from_uniform((counts.double() / len(x)).numpy()))


def kl_from_uniform(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum p log(p B) over the last axis, for shares p [..., B]; 0 log 0 = 0."""
    logs = np.log(np.where(shares > 0, shares, 1.0) * shares.shape[-1])
    return np.asarray((shares * logs).sum(-1))
