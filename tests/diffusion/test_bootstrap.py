"""Bootstrap intervals against the normal theory of means."""

import math

import numpy as np
import pytest

from diffusion.statistics import bootstrap
from diffusion.statistics.bootstrap import Estimate, Resampled


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    x = np.random.default_rng(0).standard_normal(2_000)
    estimate = bootstrap.mean(x, seed=0, which=Resampled.FAKE)
    low, high = estimate.interval()
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert estimate.value == x.mean()
    # 200 replicates know a 2.5% quantile to about a seventh.
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.25 * half)


def test_a_number_that_cannot_vary_has_no_interval() -> None:
    assert bootstrap.mean(np.ones(7), seed=0, which=Resampled.REAL).interval() == (1, 1)


def test_the_two_sets_and_the_seeds_are_resampled_independently() -> None:
    draws = [
        bootstrap.resample(seed, replicate, which, 100)
        for seed in (0, 1)
        for replicate in (0, 1)
        for which in Resampled
    ]
    assert len({draw.tobytes() for draw in draws}) == 8
    assert np.array_equal(draws[0], bootstrap.resample(0, 0, Resampled.REAL, 100))


def test_what_two_runs_share_cancels_in_their_difference() -> None:
    x = np.random.default_rng(0).standard_normal(500)
    first, second = (bootstrap.mean(x + shift, seed=0, which=Resampled.FAKE) for shift in (0.0, 0.25))
    assert (second - first).interval() == pytest.approx((0.25, 0.25), abs=1e-12)


def test_a_biased_statistic_keeps_its_own_value_in_the_middle() -> None:
    """The largest of the resampled numbers is never above the largest of all."""
    estimate = Estimate.of(1.0, np.linspace(0.2, 0.8, 200))
    assert np.mean(estimate.interval()) == pytest.approx(1.0)
