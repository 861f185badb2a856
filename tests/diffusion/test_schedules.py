"""Schedules against published values and against denoising-diffusion-pytorch."""

import pytest
import torch
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

from diffusion.process.schedules import alphas_cumprod, alphas_cumprod_at, cosine_betas, linear_betas, log_snr


@pytest.mark.parametrize(("schedule", "last"), [("linear", 4.04e-5), ("cosine", 2.4e-9)])
def test_the_final_alpha_bar_is_the_known_one(schedule: str, last: float) -> None:
    assert float(alphas_cumprod(schedule, 1000)[-1]) == pytest.approx(last, rel=0.02)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_betas_equal_the_librarys(timesteps: int) -> None:
    torch.testing.assert_close(linear_betas(timesteps), library.linear_beta_schedule(timesteps), rtol=1e-12, atol=0)
    torch.testing.assert_close(cosine_betas(timesteps), library.cosine_beta_schedule(timesteps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alpha_bar_between_timesteps_meets_both_ends_and_halves_the_log_snr(schedule: str) -> None:
    abar = alphas_cumprod(schedule, 1000)
    t = torch.arange(999, dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod_at(abar, t), abar[:-1], rtol=1e-9, atol=0)
    middle = (log_snr(abar[1:]) + log_snr(abar[:-1])) / 2
    torch.testing.assert_close(log_snr(alphas_cumprod_at(abar, t + 0.5)), middle, rtol=1e-9, atol=1e-9)
