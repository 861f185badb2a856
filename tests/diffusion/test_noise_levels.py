"""The timesteps that a training draws follow their distribution, and their losses are those of v."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from diffusion.process.model import timesteps
from diffusion.process.noise_levels import NoiseLevels
from diffusion.process.randomness import Stream, stratified
from diffusion.process.schedules import alphas_cumprod, log_snr

LINEAR = alphas_cumprod("linear", 1000)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("mean", "std"), [(-0.2, 0.9), (0.5, 0.5)])
def test_nine_of_ten_noise_levels_are_log_normal(mean: float, std: float, schedule: str) -> None:
    abar, n = alphas_cumprod(schedule, 1000), 100_000
    drawn = NoiseLevels(abar, (mean, std)).timesteps(stratified(0, Stream.TIMESTEP, 1, 0, n, n))
    level = -log_snr(abar).numpy()
    edges = (level[1:] + level[:-1]) / 2  # a timestep stands for the levels that are nearer to it than to others
    counts = np.bincount(drawn, minlength=1000).cumsum()[:-1] / n
    exact = np.array([0.9 * NormalDist(mean, std).cdf(edge) + 0.1 * (t + 1) / 1000 for t, edge in enumerate(edges)])
    assert np.abs(counts - exact).max() < 0.002


def test_the_loss_is_that_of_v() -> None:
    abar = LINEAR.sqrt(), (1 - LINEAR).sqrt()
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = (torch.randn(1000, dtype=torch.float64, generator=generator) for _ in range(3))
    v, xt = abar[0] * eps - abar[1] * x0, abar[0] * x0 + abar[1] * eps
    guessed_eps = abar[1] * xt + abar[0] * guess
    weighted = (guessed_eps - eps) ** 2 * NoiseLevels(LINEAR, (0.0, 1.0)).weights
    torch.testing.assert_close(weighted, (guess - v) ** 2, rtol=1e-6, atol=1e-9)


def test_by_default_all_timesteps_come_and_count_alike() -> None:
    levels = NoiseLevels(LINEAR, None)
    u = stratified(3, Stream.TIMESTEP, 1, 0, 4096, 4096)
    assert (levels.timesteps(u) == timesteps(u, 1000)).all()
    assert torch.equal(levels.weights, torch.ones(1000))


def test_the_largest_number_gives_a_timestep() -> None:
    assert NoiseLevels(LINEAR, (5.0, 5.0)).timesteps(np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [0, 999]
