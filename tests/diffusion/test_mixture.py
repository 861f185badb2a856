"""The mixture's closed forms against scipy, numerical integration and the single Gaussian."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, normal, uniform
from diffusion.settings import MixtureSettings

ABAR = [0.999, 0.7, 0.2, 0.01]


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture.of(MixtureSettings(means=(-2.0, 0.5, 3.0), stds=(0.3, 0.6, 0.2), weights=(0.5, 0.2, 0.3)))


def posterior_moments(mixture: Mixture, x: float, abar: float) -> tuple[float, float]:
    """E[eps | x_t] and Var(eps | x_t) by integrating over x0, without any of the formulas under test."""
    a, b = abar**0.5, (1 - abar) ** 0.5

    grid = np.linspace(-6, 6, 2001)
    parts = zip(*(column.tolist() for column in (mixture.weights, mixture.means, mixture.stds)), strict=True)
    weight = sum(w * stats.norm.pdf(grid, m, s) for w, m, s in parts) * stats.norm.pdf(x, a * grid, b)
    eps = (x - a * grid) / b
    total = integrate.simpson(weight, x=grid)
    mean = integrate.simpson(weight * eps, x=grid) / total
    return mean, integrate.simpson(weight * eps**2, x=grid) / total - mean**2


@pytest.mark.parametrize("abar", [0.9, 0.5, 0.05])
@pytest.mark.parametrize("x", [-2.5, -0.3, 0.8, 2.0])
def test_optimal_eps_and_its_variance_equal_the_integrals(mixture: Mixture, x: float, abar: float) -> None:
    mean, variance = posterior_moments(mixture, x, abar)
    xt, a = torch.tensor([x], dtype=torch.float64), torch.tensor([abar], dtype=torch.float64)
    assert mixture.eps(xt, a).item() == pytest.approx(mean, abs=1e-4)
    assert mixture.eps_variance(xt, a).item() == pytest.approx(variance, abs=1e-4)


@pytest.mark.parametrize("abar", ABAR)
def test_optimal_eps_is_minus_b_times_the_score(mixture: Mixture, abar: float) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    log_p = torch.log(mixture.at(abar).pdf(x)).sum()
    (score,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(mixture.eps(x, torch.tensor(abar, dtype=torch.float64)), -((1 - abar) ** 0.5) * score)


@pytest.mark.parametrize("abar", ABAR)
def test_density_integrates_to_the_distribution_function_and_quantile_inverts_it(mixture: Mixture, abar: float) -> None:
    pt = mixture.at(abar)
    grid = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(pt.pdf(grid), grid)
    torch.testing.assert_close(integral, pt.cdf(grid[1:]), atol=1e-6, rtol=0)
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    torch.testing.assert_close(pt.cdf(pt.quantile(u)), u, atol=1e-12, rtol=0)


def test_a_single_gaussian_has_the_textbook_answers() -> None:
    gaussian = Mixture.of(MixtureSettings(means=(0.7,), stds=(0.5,), weights=(1.0,)))
    abar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    a, b, v = abar.sqrt(), (1 - abar).sqrt(), abar * 0.25 + 1 - abar
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(gaussian.eps(x, abar), b * (x - a * 0.7) / v)
    torch.testing.assert_close(gaussian.loss_floor(abar), abar * 0.25 / v, rtol=1e-8, atol=0)
    standard = Mixture.of(MixtureSettings(means=(0.0,), stds=(1.0,), weights=(1.0,)))
    torch.testing.assert_close(standard.loss_floor(abar), abar, rtol=1e-8, atol=0)
    torch.testing.assert_close(standard.eps(x, abar), b * x)


def test_the_loss_floor_is_the_mean_loss_of_the_optimal_prediction(mixture: Mixture) -> None:
    n, abar = 200_000, torch.tensor(0.3, dtype=torch.float64)
    x0 = mixture.sample(
        torch.from_numpy(uniform(1, Stream.COMPONENT, 0, 0, n)), torch.from_numpy(normal(1, Stream.DATA, 0, 0, n))
    )
    eps = torch.from_numpy(normal(1, Stream.NOISE, 0, 0, n)).double()
    squared_error = (mixture.eps(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, abar) - eps) ** 2
    standard_error = float(squared_error.std()) / n**0.5
    assert float(mixture.loss_floor(abar[None])) == pytest.approx(float(squared_error.mean()), abs=4 * standard_error)
