"""Feature metrics against closed forms, scipy, double loops and the package prdc."""

import math
from typing import Any

import numpy as np
import prdc
import pytest
from numpy.typing import NDArray
from scipy import linalg

from diffusion.statistics.features import frechet, frechet_distance, kernel_distance, overlap

METRICS = [frechet_distance, kernel_distance, overlap]


def gaussian(n: int, d: int = 4, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_frechet_distance_equals_scipys_square_root_of_the_product() -> None:
    real, fake = gaussian(100, 6), gaussian(80, 6, seed=1) @ gaussian(6, 6, seed=2) + 0.5
    covariance, covariance_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = linalg.sqrtm(covariance @ covariance_fake).real
    shift = real.mean(0) - fake.mean(0)
    known = shift @ shift + np.trace(covariance + covariance_fake - 2 * root)
    assert frechet(real, fake) == pytest.approx(known, rel=1e-9)
    assert frechet_distance(real, fake, seed=0).value == frechet(real, fake)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_frechet_distance_is_right_where_covariances_are_singular(n: int) -> None:
    real = gaussian(n, 64)
    assert frechet(real, real) == pytest.approx(0, abs=1e-10)
    assert frechet(real, real + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    constant = np.full((5, 64), real.mean(0))
    assert frechet(real, constant) == pytest.approx(real.var(0, ddof=1).sum(), rel=1e-9)


def test_kernel_distance_equals_the_double_loop() -> None:
    real, fake = gaussian(7, 3), gaussian(9, 3, seed=1) + 0.4

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = np.mean([kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j])
    within_fake = np.mean([kernel(x, y) for i, x in enumerate(fake) for j, y in enumerate(fake) if i != j])
    between = np.mean([kernel(x, y) for x in real for y in fake])
    known = within + within_fake - 2 * between
    assert kernel_distance(real, fake, seed=0).value == pytest.approx(known, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(gaussian(20, seed=2 * i), gaussian(20, seed=2 * i + 1), seed=0).value for i in range(49)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / 7)


@pytest.mark.parametrize("k", [1, 5])
def test_overlap_equals_prdc(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = gaussian(700, 8), 0.8 * gaussian(600, 8, seed=1) + 0.3  # more than one chunk
    known = prdc.compute_prdc(real, fake, nearest_k=k)
    assert {name: estimate.value for name, estimate in overlap(real, fake, k=k, seed=0).items()} == pytest.approx(known)


def test_equal_distributions_have_the_known_coverage_and_density() -> None:
    """A real is not covered if its k nearest of all others are reals (Naeem et al. 2020, lemma 2); density is 1."""
    n, m, k = 120, 90, 5
    found = [overlap(gaussian(n, seed=2 * i), gaussian(m, seed=2 * i + 1), k=k, seed=0) for i in range(36)]
    known = 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    for name, expected in (("coverage", known), ("density", 1)):
        values = [each[name].value for each in found]
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / 6)


def test_the_intervals_are_as_wide_as_the_numbers_spread() -> None:
    for metric in (frechet_distance, kernel_distance):
        estimates = [metric(gaussian(100, seed=i), gaussian(100, seed=100 + i) + 0.5, seed=0) for i in range(30)]
        spread = np.std([estimate.value for estimate in estimates])
        widths = [np.subtract(*estimate.interval()[::-1]) for estimate in estimates]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.35)


def test_overlap_knows_a_collapsed_and_a_spread_out_model() -> None:
    real = gaussian(300, 8)
    exact = overlap(real, real, seed=0)
    assert [exact[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    collapsed = overlap(real, np.repeat(real[:1], 300, axis=0), seed=0)
    assert collapsed["precision"].value == 1
    assert collapsed["recall"].value == pytest.approx(1 / 300)
    assert collapsed["coverage"].value < 0.1
    spread_out = overlap(real, 5 * gaussian(300, 8, seed=1), seed=0)
    assert spread_out["precision"].value < 0.05
    assert spread_out["density"].value < 0.05
    assert spread_out["recall"].value > 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_seed_gives_the_same_interval_and_another_seed_another(metric: Any) -> None:
    def intervals(seed: int) -> list[tuple[float, float]]:
        found = metric(gaussian(50), gaussian(60, seed=1) + 0.1, seed=seed)
        return [each.interval() for each in (found.values() if isinstance(found, dict) else [found])]

    assert intervals(0) == intervals(0)
    assert intervals(0) != intervals(1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (gaussian(50), gaussian(1), "fake features must be .n, d. with n at least"),
        (gaussian(50), gaussian(50)[0], "fake features must be .n, d."),
        (gaussian(50), gaussian(50, 5), "equally wide; got 4 and 5"),
        (gaussian(50), np.full((50, 4), np.nan), "fake features must be finite; got 50 rows that are not"),
        (np.where(gaussian(50) > 1, np.inf, 0), gaussian(50), "real features must be finite"),
    ],
)
def test_what_has_no_distance_is_refused(metric: Any, real: Any, fake: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(real, fake, seed=0)
