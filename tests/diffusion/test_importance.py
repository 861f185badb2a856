"""Importance sampling draws other timesteps, and leaves the loss what it is."""

import numpy as np
import pytest
import torch

from diffusion.process.importance import Importance
from diffusion.process.model import timesteps
from diffusion.process.randomness import Stream, stratified
from diffusion.process.schedules import alphas_cumprod


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_timesteps_come_as_often_as_asked_for_and_weights_make_up_for_it(power: float, schedule: str) -> None:
    abar = alphas_cumprod(schedule, 1000)
    importance, n = Importance(abar, power), 1_000_000
    counts = np.bincount(importance.timesteps(stratified(0, Stream.TIMESTEP, 1, 0, n, n)), minlength=1000)
    expected = (abar**power / (abar**power).sum()).numpy()
    assert np.abs(counts - n * expected).max() <= 2  # the draws are stratified
    np.testing.assert_allclose(expected * importance.weights.numpy(), 1 / 1000, rtol=1e-6)


def test_power_0_is_no_importance_at_all() -> None:
    importance = Importance(alphas_cumprod("linear", 1000), 0)
    u = stratified(3, Stream.TIMESTEP, 1, 0, 4096, 4096)
    assert (importance.timesteps(u) == timesteps(u, 1000)).all()
    assert torch.equal(importance.weights, torch.ones(1000))


def test_the_largest_number_gives_the_last_timestep() -> None:
    importance = Importance(alphas_cumprod("linear", 1000), 0.5)
    assert importance.timesteps(np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [0, 999]
