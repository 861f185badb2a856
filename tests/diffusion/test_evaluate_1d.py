"""The 1D evaluation against closed forms: the exact denoiser must be perfect, known mistakes must show their size."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from diffusion.gaussian1d import distances, figures
from diffusion.gaussian1d.evaluation import Evaluator1d
from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.gaussian1d.mixture import Mixture
from diffusion.gaussian1d.sample_distances import BINS, sample_metrics
from diffusion.gaussian1d.sampler_errors import sampler_errors
from diffusion.problems.gaussian1d import Gaussian1dProblem
from diffusion.process.model import DiffusionModel
from diffusion.process.randomness import Stream, normal, uniform
from diffusion.process.samplers import Denoiser
from diffusion.settings import (
    SAMPLERS,
    ClassMlpSettings,
    DiffusionSettings,
    MixtureSettings,
    MlpSettings,
    SamplerSettings,
)
from diffusion.statistics.evaluator import Drawn
from diffusion.statistics.flow import log_likelihood

EXPERIMENT = Gaussian1d(MixtureSettings(), MlpSettings(), DiffusionSettings(timesteps=100))
MIXTURE, ABAR = EXPERIMENT.mixture, EXPERIMENT.abar
START = MIXTURE.at(float(ABAR[0]))


def exact_samples(n: int, seed: int) -> Tensor:
    u, z = uniform(seed, Stream.COMPONENT, 0, 0, n), normal(seed, Stream.DATA, 0, 0, n)
    return MIXTURE.sample(torch.from_numpy(u), torch.from_numpy(z)).float()


def quantiles(mixture: Mixture, n: int) -> Tensor:
    return mixture.quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize("x", [[0.0], [5.0], [-100.0], [0.0, 0.0, 0.0], [3.0, -2.0, 0.5, 0.5, 40.0]])
def test_wasserstein_is_exact_for_few_samples_and_wild_ones(x: list[float]) -> None:
    def area(q: float) -> float:
        empirical = sum(value <= q for value in x) / len(x)
        return abs(empirical - float(MIXTURE.cdf(torch.tensor(q, dtype=torch.float64))))

    known, _ = integrate.quad(area, min(-20, *x), max(20, *x), points=sorted({-2.0, 1.5, *x}), limit=500)
    assert distances.wasserstein1(torch.tensor(x), MIXTURE) == pytest.approx(known, rel=1e-5)


def test_the_entropy_is_that_of_quadrature_and_of_a_gaussian() -> None:
    def integrand(q: float) -> float:
        p = float(MIXTURE.pdf(torch.tensor(q, dtype=torch.float64)))
        return -p * math.log(p)

    assert MIXTURE.entropy() == pytest.approx(integrate.quad(integrand, -8, 8, points=[-2, 1.5])[0], abs=1e-9)
    gaussian = Mixture.of(MixtureSettings(means=(0.3,), stds=(0.7,), weights=(1.0,)))
    assert gaussian.entropy() == pytest.approx(stats.norm(0.3, 0.7).entropy(), abs=1e-9)


def test_histogram_kl_is_zero_for_quantiles_and_known_for_a_missing_half() -> None:
    x = quantiles(MIXTURE, 64 * BINS)
    assert distances.histogram_kl(x, MIXTURE, BINS) == pytest.approx(0, abs=1e-12)
    assert distances.histogram_kl(x[: len(x) // 2], MIXTURE, BINS) == pytest.approx(math.log(2), abs=1e-12)
    shares = np.histogram(exact_samples(500, 1), MIXTURE.quantile(torch.linspace(0, 1, 9)))[0] / 500
    assert distances.kl_from_uniform(shares) == pytest.approx(stats.entropy(shares, np.full(8, 1 / 8)), abs=1e-12)


def test_floors_are_those_of_theory_and_exact_samples_lie_within_them() -> None:
    n = 5_000
    floors = {name: floor for name, (_, floor) in sample_metrics(exact_samples(n, 0), MIXTURE, 0).items()}
    assert floors["w1"].value == pytest.approx(distances.wasserstein1_floor(MIXTURE, n), rel=0.1)
    assert floors["ks"].value == pytest.approx(distances.kolmogorov_smirnov_floor(n), rel=0.06)
    assert floors["kl"].value == pytest.approx((BINS - 1) / (2 * n), rel=0.06)
    assert floors["share_0"].value == pytest.approx(0.35, abs=0.002)
    draws = [exact_samples(n, seed) for seed in range(40)]
    found = {
        "w1": [distances.wasserstein1(x, MIXTURE) for x in draws],
        "ks": [distances.kolmogorov_smirnov(x, MIXTURE) for x in draws],
        "kl": [distances.histogram_kl(x, MIXTURE, BINS) for x in draws],
    }
    for name, values in found.items():
        low, high = floors[name].interval()
        inside = sum(low <= value <= high for value in values)
        assert inside >= 33, name  # of 40; 95% of exact samples do, and 32 or fewer have a probability below 1e-3


def test_intervals_cover_what_another_draw_gives() -> None:
    """The spread of a bootstrap is that of independent sets, for samples with an error that is far from the floor."""
    n, shift = 2_000, 0.3
    draws = [sample_metrics(exact_samples(n, seed) + shift, MIXTURE, 0) for seed in range(12)]
    for name in ("w1", "share_0"):
        spread = np.std([draw[name][0].value for draw in draws], ddof=1)
        claimed = np.mean([draw[name][0].replicates.std() for draw in draws])
        assert claimed == pytest.approx(spread, rel=0.5), name  # a standard deviation of 12 is known to 21%


def test_the_exact_denoiser_has_the_likelihood_of_the_data() -> None:
    x = quantiles(START, 200)
    found = log_likelihood(EXPERIMENT.exact_predict, x[:, None], ABAR)
    torch.testing.assert_close(found[5:-5], START.pdf(x).log()[5:-5], atol=5e-3, rtol=0)
    gap = float((START.pdf(x).log() - found).mean())
    assert gap == pytest.approx(0, abs=5e-4)
    assert -float(found.mean()) == pytest.approx(START.entropy(), abs=0.01)


def test_the_likelihood_of_a_shifted_gaussian_lacks_its_kl_divergence() -> None:
    """A network that is exact for N(0.5, 1) as the model of N(0, 1), whose KL divergence is 0.5^2 / 2."""
    settings = [MixtureSettings(means=(mean,), stds=(1.0,), weights=(1.0,)) for mean in (0.5, 0.0)]
    wrong, right = (Gaussian1d(each, MlpSettings(), DiffusionSettings(timesteps=1000)) for each in settings)
    start = right.mixture.at(float(right.abar[0]))
    x = quantiles(start, 400)
    gap = float((start.pdf(x).log() - log_likelihood(wrong.exact_predict, x[:, None], right.abar)).mean())
    assert gap == pytest.approx(0.125, rel=0.02)


def test_sampler_errors_of_the_exact_denoiser_are_the_samplers_and_fall_with_their_order() -> None:
    experiment = Gaussian1d(MixtureSettings(), MlpSettings(), DiffusionSettings())
    exact = Denoiser(experiment.exact_predict, experiment.abar)

    def error(sampler: str, steps: int) -> float:
        settings = SamplerSettings(sampler=sampler, steps=steps)  # type: ignore[arg-type]
        found = sampler_errors(exact, exact, experiment.mixture, settings)
        assert found.network_alone == 0
        assert found.total == found.sampler_alone
        return found.total

    ddim, dpm = [error("ddim", steps) / error("ddim", 2 * steps) for steps in (20, 40)], error("dpm++", 20)
    assert all(1.7 < ratio < 2.8 for ratio in ddim)  # the first order halves
    assert dpm / error("dpm++", 40) > 3.5  # the second order quarters


class Biased(DiffusionModel):
    """The exact denoiser with 0.1 too much, as a model."""

    def predict(self, xt: Tensor, t: Tensor) -> Tensor:
        return EXPERIMENT.exact_predict(xt, t) + 0.1


def test_an_evaluation_finds_a_known_mistake_and_survives_without_the_model() -> None:
    x = exact_samples(4_000, 3).numpy()
    sampler = SamplerSettings(sampler="ddim", steps=10)
    model = Biased(torch.nn.Identity(), ABAR)
    evaluator = Evaluator1d(EXPERIMENT, Drawn(x, model, sampler))
    units = evaluator.units()
    slow_ones = ["100", *(name for name, kind in SAMPLERS.items() if not kind.is_deterministic)]
    results = {name: unit.compute() for name, unit in units.items() if not any(slow in name for slow in slow_ones)}
    results |= dict.fromkeys(units.keys() - results.keys(), results["sampler-ddim-10"])
    found = evaluator.metrics(results)
    assert found["excess_loss"].value == pytest.approx(0.01, rel=1e-3)
    assert found["likelihood_gap"].value > 0.01
    assert found["log_likelihood"].value == pytest.approx(-START.entropy() - found["likelihood_gap"].value)
    alone = Evaluator1d(EXPERIMENT, Drawn(x, None, sampler))
    assert list(alone.units()) == ["samples"]
    known = {4: ["w1", "ks", "kl", "share_0", "share_1"]}  # a new metric needs a new version, or nobody gets it
    assert list(alone.metrics(results)) == known[Gaussian1dProblem.metrics_version]


@pytest.mark.usefixtures("coarse_figures")
def test_samples_that_all_lie_outside_of_a_figure_are_drawn_without_a_warning(tmp_path: Path) -> None:
    """As after one step of DPM-Solver++: warnings are errors in tests."""
    figures.samples(MIXTURE, np.full(100, 99.0), tmp_path / "grid.png")
    figures.guidance([MIXTURE], [[torch.full((100,), 99.0)]], [1.0], tmp_path / "guidance.png")
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "guidance.png").is_file()


def test_another_sampler_to_compare_comes_with_a_new_version() -> None:
    """Without one, what an older version has evaluated would count as complete, and never get the new rows."""
    known = {4: ["ddpm", "ddim", "dpm++", "heun", "sde-dpm++"]}
    assert list(SAMPLERS) == known[Gaussian1dProblem.metrics_version]


def test_the_floor_of_samples_of_classes_has_as_many_of_each() -> None:
    """The distance of exact samples is the smaller for it: chance does not decide how many go to each component."""
    n = 4_000
    classes = torch.arange(n) % 2
    target = MIXTURE.of_classes(torch.tensor([1, 1]))
    draws = [normal(seed, Stream.DATA, 0, 0, n) for seed in range(20)]
    exact = [target.means[classes] + target.stds[classes] * torch.from_numpy(z) for z in draws]
    floor = sample_metrics(exact[0], target, 0, [n // 2, n // 2])["w1"][1]
    w1 = [distances.wasserstein1(x, target) for x in exact]
    assert floor.value == pytest.approx(np.mean(w1), rel=0.15)
    assert floor.replicates.std() == pytest.approx(np.std(w1), rel=0.6)


def test_samples_of_classes_are_compared_with_so_many_of_each() -> None:
    told = Gaussian1d(MixtureSettings(), ClassMlpSettings(), DiffusionSettings(timesteps=100))
    n, sampler = 4_000, SamplerSettings(sampler="ddim", steps=10)
    classes = np.arange(n) % 4 // 3  # three of class 0 for each of class 1, unlike the mixture
    x = MIXTURE.means[classes] + MIXTURE.stds[classes] * torch.from_numpy(normal(5, Stream.DATA, 0, 0, n))

    def judged(classes: np.ndarray) -> dict[str, float]:
        evaluator = Evaluator1d(told, Drawn(x.float().numpy(), None, sampler, classes))
        found = evaluator.metrics({"samples": evaluator.units()["samples"].compute()})
        return {name: metric.value / metric.floor.value for name, metric in found.items()}  # type: ignore[union-attr]

    right = judged(classes)
    assert max(right[name] for name in ("w1", "ks", "w1_class_0", "w1_class_1")) < 2.5
    swapped = judged(1 - classes)
    assert min(swapped[name] for name in ("w1", "w1_class_0", "w1_class_1")) > 10
