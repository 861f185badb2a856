"""Likelihoods along the probability-flow ODE against the closed forms of Gaussians in 784 dimensions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffusion.process.samplers import Denoiser
from diffusion.process.schedules import alphas_cumprod, alphas_cumprod_at
from diffusion.statistics import bits_per_dim
from diffusion.statistics.flow import IMAGE_STEPS, bits, log_likelihood
from tests.diffusion.test_likelihood import LEVEL, S2, two_levels

ABAR = alphas_cumprod("linear", 1000)
SIZE, N = 784, 64


def linear(xt: Tensor, t: Tensor, variances: Tensor) -> Tensor:
    """The exact denoiser of a Gaussian of mean 0 and diagonal covariance, which broadcasts against xt."""
    abar = alphas_cumprod_at(ABAR, t.double()).view(-1, *[1] * (xt.ndim - 1))
    return (1 - abar).sqrt() * xt / (abar * variances + 1 - abar)


def flow_variances(variances: Tensor) -> Tensor:
    """Those at t = 0 of the exact flow, which begins with the standard normal at t = T - 1."""
    first, last = (abar * variances + 1 - abar for abar in (ABAR[0], ABAR[-1]))
    return first / last


@pytest.mark.parametrize("rotated", [False, True])
def test_a_gaussian_in_784_dimensions_has_its_likelihood(rotated: bool) -> None:
    """Random signs give the trace of a diagonal matrix exactly, and an unbiased estimate of any other."""
    generator = torch.Generator().manual_seed(0)
    variances = torch.logspace(-5, 0.5, SIZE, dtype=torch.float64)  # black pixels hardly vary
    noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(noise)[0] if rotated else torch.eye(SIZE, dtype=torch.float64)
    principal = flow_variances(variances).sqrt() * torch.randn(N, SIZE, generator=generator, dtype=torch.float64)
    known = Normal(0.0, flow_variances(variances).sqrt()).log_prob(principal).sum(1)
    signs = torch.randint(0, 2, (N, SIZE), generator=generator) * 2 - 1
    found = log_likelihood(
        lambda xt, t: linear(xt @ turn, t, variances) @ turn.T, principal @ turn.T, ABAR, signs, IMAGE_STEPS
    )
    error = (found - known) / SIZE / math.log(2)
    if rotated:
        assert error.std() > 1e-3
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(N)
    else:
        assert error.abs().max() < 1e-3


def test_bits_per_dimension_of_a_gaussian_have_their_closed_form() -> None:
    """Pixels are +-sqrt(S2), under the flow of a Gaussian of variance S2."""
    denoiser = Denoiser(lambda xt, t: linear(xt, t, torch.tensor(S2)).float(), ABAR, (-1, 1))
    found = bits(denoiser, two_levels(256), first=0, seed=0)
    variance, width = float(flow_variances(torch.tensor(S2))), 2 / 255
    a2, b2 = float(ABAR[0]), 1 - float(ABAR[0])
    cross_entropy = [
        math.log(2 * math.pi * variance) / 2 + a2 * (S2 + added) / (2 * variance) for added in (0, width**2 / 12)
    ]
    uniform = cross_entropy[1] - math.log(math.sqrt(a2) * width)

    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    x = torch.tensor(2 * LEVEL / 255 - 1, dtype=torch.float64)
    noisy = math.sqrt(a2) * x + math.sqrt(b2) * z
    x0 = (noisy - b2 * noisy / (a2 * S2 + b2)) / math.sqrt(a2)
    decoder = float((weight * bits_per_dim.log_likelihood(x, x0, bits_per_dim.decoder_std(ABAR))).sum())
    model = cross_entropy[0] + b2 / (2 * variance) - math.log(2 * math.pi * math.e * b2) / 2 - decoder

    for noise, nats in (("uniform", uniform), ("model", model)):
        mean, error = bits_per_dim.mean_and_error(found[noise])
        assert float(mean) == pytest.approx(nats / math.log(2), abs=4 * float(error) + 1e-4), noise
        assert error < 0.006


def test_an_images_noise_depends_on_its_index_alone() -> None:
    images = two_levels(6)

    def share(start: int, stop: int) -> np.ndarray:
        denoiser = Denoiser(lambda xt, t: linear(xt, t, torch.tensor(S2)), ABAR)
        return np.stack(list(bits(denoiser, images[start:stop], first=start, seed=1).values()))

    whole = share(0, 6)
    np.testing.assert_allclose(np.concatenate([share(0, 2), share(2, 6)], axis=1), whole, rtol=1e-9)
    assert len(set(whole[0])) == 6
