"""Variance schedules. A process is its alphas_cumprod, [T] in float64; t counts from 0 (least noise) to T-1."""

import math

import torch
from torch import Tensor


def linear_betas(timesteps: int) -> Tensor:
    """1e-4 to 0.02 for T = 1000 (DDPM, section 4), scaled for other T so that the final noise stays the same."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    """Improved DDPM (Nichol & Dhariwal 2021), equation 17, betas clipped at 0.999."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    # With this s and T = 1000, sqrt(beta) at t = 0 is a little less than a step between grey levels, 1 / 127.5.
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    # f ends at 0, so the last beta would be 1 and alpha_bar 0: its log-SNR, and x0 from eps, would be infinite.
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def alphas_cumprod(beta_schedule: str, timesteps: int) -> Tensor:
    """alpha_bar_t = prod_{s <= t} (1 - beta_s), [T] in float64."""
    betas = {"linear": linear_betas, "cosine": cosine_betas}[beta_schedule](timesteps)
    return torch.cumprod(1 - betas, dim=0)


def log_snr(abar: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), half the log of the signal-to-noise ratio (DPM-Solver, section 2)."""
    # alpha^2 = abar and sigma^2 = 1 - abar; log1p keeps the digits that 1 - abar loses where abar is small.
    return 0.5 * (torch.log(abar) - torch.log1p(-abar))


def alphas_cumprod_at(abar: Tensor, t: Tensor) -> Tensor:
    """alpha_bar at possibly fractional t, any shape: lambda runs linearly between neighbouring timesteps."""
    # Samplers place their fractional timesteps by the same rule, so network and sampler mean one noise level.
    lower = t.floor().long().clamp(0, len(abar) - 1)
    upper = (lower + 1).clamp(max=len(abar) - 1)
    lam = log_snr(abar)
    return torch.sigmoid(2 * torch.lerp(lam[lower], lam[upper], (t - lower).to(lam.dtype)))
