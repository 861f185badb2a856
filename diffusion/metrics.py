"""How far a model and its samples are from the exact answer."""

import math

import torch
from torch import Tensor

from diffusion.mixture import Mixture
from diffusion.samplers import Predict


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
    """W1 between the samples x [n] and the mixture: the area between the empirical and the exact quantile function."""
    n = len(x)
    exact = mixture.quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return float((x.double().sort().values - exact).abs().mean())


def wasserstein1_floor(mixture: Mixture, n: int) -> float:
    """E W1(n exact samples, mixture) ~ sqrt(2 / (pi n)) integral sqrt(F (1 - F)) dx (del Barrio et al. 1999)."""
    x = mixture.quantile(torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64))
    grid = torch.linspace(float(x[0]), float(x[1]), 20_001, dtype=torch.float64)
    f = mixture.cdf(grid)
    return math.sqrt(2 / (math.pi * n)) * float(torch.trapezoid((f * (1 - f)).clamp(min=0).sqrt(), grid))


def kolmogorov_smirnov(x: Tensor, mixture: Mixture) -> float:
    """The largest distance between the empirical and the exact distribution function."""
    n = len(x)
    f = mixture.cdf(x.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps[1:] - f, f - steps[:-1]).max())


def kolmogorov_smirnov_floor(n: int) -> float:
    """E KS(n exact samples, truth) ~ sqrt(pi / 2) ln 2 / sqrt(n), the mean of Kolmogorov's distribution."""
    return math.sqrt(math.pi / (2 * n)) * math.log(2)
