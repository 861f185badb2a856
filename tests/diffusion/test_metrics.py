"""Metrics against scipy, closed forms and simulation."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.gaussian1d import distances
from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, normal, uniform
from diffusion.settings import DiffusionSettings, MixtureSettings, MlpSettings

SETTINGS = MixtureSettings()
MIXTURE = Mixture.of(SETTINGS)


def exact_samples(n: int, seed: int) -> Tensor:
    u, z = uniform(seed, Stream.COMPONENT, 0, 0, n), normal(seed, Stream.DATA, 0, 0, n)
    return MIXTURE.sample(torch.from_numpy(u), torch.from_numpy(z))


def test_wasserstein_equals_scipys_distance_to_many_exact_samples() -> None:
    x, reference = exact_samples(2_000, 1) + 0.1, MIXTURE.quantile((torch.arange(100_000) + 0.5) / 100_000)
    assert distances.wasserstein1(x, MIXTURE) == pytest.approx(stats.wasserstein_distance(x, reference), abs=2e-4)


def test_exact_samples_lie_at_the_floors() -> None:
    n, repetitions = 2_000, 200
    draws = [exact_samples(n, seed) for seed in range(repetitions)]
    w1 = torch.tensor([distances.wasserstein1(x, MIXTURE) for x in draws])
    ks = torch.tensor([distances.kolmogorov_smirnov(x, MIXTURE) for x in draws])
    # The formulas hold for n to infinity; the tolerance is four standard errors of the simulation and 3%.
    for values, floor in ((w1, distances.wasserstein1_floor(MIXTURE, n)), (ks, distances.kolmogorov_smirnov_floor(n))):
        tolerance = 4 * float(values.std()) / math.sqrt(repetitions) + 0.03 * floor
        assert float(values.mean()) == pytest.approx(floor, abs=tolerance)


def test_kolmogorov_smirnov_equals_scipys() -> None:
    x = exact_samples(5_000, 3)
    known = stats.kstest(x.numpy(), lambda q: MIXTURE.cdf(torch.from_numpy(q)).numpy()).statistic
    assert distances.kolmogorov_smirnov(x, MIXTURE) == pytest.approx(known, abs=1e-12)


def test_excess_loss_is_zero_for_the_exact_denoiser_and_the_squared_bias_beside_it() -> None:
    exact = Gaussian1d(SETTINGS, MlpSettings(), DiffusionSettings(timesteps=100))
    assert float(distances.excess_loss(exact.exact_predict, MIXTURE, exact.abar).max()) < 1e-10
    biased = distances.excess_loss(lambda x, t: exact.exact_predict(x, t) + 0.1, MIXTURE, exact.abar)
    torch.testing.assert_close(biased, torch.full_like(biased, 0.01), rtol=1e-3, atol=0)


def test_excess_loss_is_the_training_loss_minus_the_floor() -> None:
    torch.manual_seed(0)
    experiment = Gaussian1d(SETTINGS, MlpSettings(dim=16), DiffusionSettings(timesteps=100))
    model, n = experiment.build_model(), 400_000
    x0 = experiment.batch(0, 1, 0, n, n, torch.device("cpu"))
    t = torch.arange(n) % 100
    eps = torch.from_numpy(normal(0, Stream.NOISE, 1, 0, n, (1,)))
    with torch.inference_mode():
        losses = model(x0, t, eps).double()
    difference = float(losses.mean() - MIXTURE.loss_floor(experiment.abar).mean())
    excess = float(distances.excess_loss(model.predict, MIXTURE, experiment.abar).mean())
    assert excess == pytest.approx(difference, abs=4 * float(losses.std()) / math.sqrt(n))
