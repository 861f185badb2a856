"""The variational bound against closed forms, quadrature, scipy and denoising-diffusion-pytorch."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffusion.process.randomness import Stream, normal, uniform
from diffusion.process.samplers import Denoiser
from diffusion.process.schedules import alphas_cumprod
from diffusion.statistics.bits_per_dim import Bound, bound, log_likelihood, mean_and_error, strata

ABAR = alphas_cumprod("linear", 100)
LEVEL, S2 = 95, (2 * 95 / 255 - 1) ** 2
"""Pixels are LEVEL or 255 - LEVEL, as often: mean 0 and variance S2 in [-1, 1]."""


def two_levels(n: int) -> NDArray[np.uint8]:
    bits = np.random.default_rng(0).integers(0, 2, (n, 8, 8, 1))
    return np.where(bits, LEVEL, 255 - LEVEL).astype(np.uint8)


def linear(xt: Tensor, t: Tensor) -> Tensor:
    """The best linear prediction of eps, whose mean squared error depends on the data's variance alone."""
    abar = ABAR[t].view(-1, 1, 1, 1)
    return ((1 - abar).sqrt() * xt / (abar * S2 + 1 - abar)).float()


LINEAR = Denoiser(linear, ABAR)


def exact_transitions() -> NDArray[np.float64]:
    """KL of q and p in bits for t = 1..T-1, [T - 1], for `linear`."""
    abar, before = ABAR[1:].numpy(), ABAR[:-1].numpy()
    alpha = abar / before
    variance = (1 - alpha) * (1 - before) / (1 - abar)
    gap = before * (1 - alpha) ** 2 / (1 - abar) ** 2 * S2 * (1 - abar) / (abar * S2 + 1 - abar)
    return np.asarray(gap / variance / 2 / math.log(2))


def test_the_terms_of_the_best_linear_denoiser_have_their_closed_form() -> None:
    found = bound(LINEAR, two_levels(60), first=0, seed=0, edges=strata(100, 99))
    mean, error = mean_and_error(found.transitions)
    assert (np.abs(mean - exact_transitions()) < 5 * error).all()
    mean, error = mean_and_error(found.transitions.sum(1))
    assert float(mean) == pytest.approx(exact_transitions().sum(), abs=4 * error)
    loss, error = mean_and_error(found.squared_error)
    abar = ABAR.numpy()
    assert (np.abs(loss - abar * S2 / (abar * S2 + 1 - abar)) < 5 * error).all()
    last = float(ABAR[-1])
    assert found.prior == pytest.approx((last * S2 - last - math.log(1 - last)) / 2 / math.log(2), rel=1e-9)


@pytest.mark.parametrize("number", [1, 7, 40])
def test_a_few_timesteps_estimate_the_same_sum_and_each_stratum_its_part(number: int) -> None:
    edges, known = strata(100, number), exact_transitions()
    found = bound(LINEAR, two_levels(400), first=0, seed=0, edges=edges)
    mean, error = mean_and_error(found.transitions)
    parts = np.add.reduceat(known, edges[:-1] - 1)
    assert (np.abs(mean - parts) < 4.5 * error).all()
    total, error = mean_and_error(found.transitions.sum(1))
    assert float(total) == pytest.approx(known.sum(), abs=4 * error)
    if number == 40:
        assert error < 0.05 * known.sum()


@pytest.mark.parametrize(("timesteps", "number"), [(1000, 63), (1000, 999), (1000, 1), (100, 99), (100, 98), (21, 5)])
def test_strata_hold_each_timestep_once(timesteps: int, number: int) -> None:
    edges = strata(timesteps, number)
    assert (edges[0], edges[-1], len(edges)) == (1, timesteps, number + 1)
    assert (np.diff(edges) >= 1).all()


def test_one_pixel_with_the_exact_denoiser_equals_quadrature_and_exceeds_the_entropy() -> None:
    levels, probability = torch.tensor([0, 40, 200, 255]), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    values = levels.double() / 127.5 - 1

    def predict(xt: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t], from the posterior over the four levels."""
        abar, x = ABAR[t].view(-1, 1), xt.double().view(-1, 1)
        posterior = (probability.log() - (x - abar.sqrt() * values) ** 2 / (2 * (1 - abar))).softmax(1)
        eps = (x[:, 0] - abar[:, 0].sqrt() * (posterior * values).sum(1)) / (1 - abar[:, 0]).sqrt()
        return eps.view_as(xt)

    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    known, measured, errors = [], [], []
    for value, level in zip(values, levels, strict=True):
        nats = torch.distributions.kl_divergence(
            torch.distributions.Normal(ABAR[-1].sqrt() * value, (1 - ABAR[-1]).sqrt()),
            torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double()),
        )
        for t in range(100):
            xt = ABAR[t].sqrt() * value + (1 - ABAR[t]).sqrt() * z
            eps = predict(xt, torch.full((len(z),), t))
            x0 = (xt - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
            nats = nats + (weight * quadrature_term(t, xt, x0, value, int(level))).sum()
        known.append(float(nats) / math.log(2))
        images = np.full((100, 1, 1, 1), int(level), np.uint8)
        found = bound(Denoiser(predict, ABAR), images, first=0, seed=0, edges=strata(100, 99))
        mean, error = mean_and_error(found.total)
        measured.append(float(mean))
        errors.append(float(error))
    assert (np.abs(np.subtract(measured, known)) < 4 * np.array(errors) + 1e-6).all()
    entropy = float(-(probability * probability.log2()).sum())
    assert float(probability @ torch.tensor(known, dtype=torch.float64)) > entropy


def quadrature_term(t: int, xt: Tensor, x0: Tensor, value: Tensor, level: int) -> Tensor:
    """One term of the bound in nats at each x_t, by torch's own Gaussians and scipy's distribution function."""
    before = ABAR[t - 1] if t else torch.tensor(1.0).double()
    alpha = ABAR[t] / before
    if t == 0:
        std = math.sqrt((1 - ABAR[1] / ABAR[0]) * (1 - ABAR[0]) / (1 - ABAR[1]))
        low = -np.inf if level == 0 else float(value) - 1 / 255
        high = np.inf if level == 255 else float(value) + 1 / 255
        mass = stats.norm.cdf(high, x0.numpy(), std) - stats.norm.cdf(low, x0.numpy(), std)
        return -torch.from_numpy(np.log(np.maximum(mass, 1e-300)))
    std_q = ((1 - alpha) * (1 - before) / (1 - ABAR[t])).sqrt()

    def posterior(x: Tensor) -> torch.distributions.Normal:
        mean = (before.sqrt() * (1 - alpha) * x + alpha.sqrt() * (1 - before) * xt) / (1 - ABAR[t])
        return torch.distributions.Normal(mean, std_q.expand_as(mean))

    return torch.distributions.kl_divergence(posterior(value.expand_as(xt)), posterior(x0))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.01), (-0.9, 0.5), (1.4, 0.02), (0.003, 1e-3)])
def test_the_decoder_is_a_distribution_over_256_levels_and_scipys(mean: float, std: float) -> None:
    x0 = torch.arange(256).double() / 127.5 - 1
    log_p = log_likelihood(x0, torch.tensor(mean, dtype=torch.float64), std).numpy()
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)
    assert np.isfinite(log_p).all()
    edges = np.concatenate([[-np.inf], (x0[:-1].numpy() + x0[1:].numpy()) / 2, [np.inf]])
    np.testing.assert_allclose(np.exp(log_p), np.diff(stats.norm.cdf(edges, mean, std)), atol=1e-14, rtol=1e-9)


def test_the_terms_equal_the_librarys_gaussians() -> None:
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=1).eval()
    library = GaussianDiffusion(unet, image_size=28, objective="pred_noise", beta_schedule="linear")
    image = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), dtype=np.uint8)
    edges = strata(1000, 20)
    found = bound(Denoiser(unet, library.alphas_cumprod, (-1, 1)), image, first=3, seed=5, edges=edges)
    sizes = np.diff(edges)
    t = torch.from_numpy(edges[:-1] + (uniform(5, Stream.TIMESTEP, 3, 0, 20) * sizes).astype(np.int64))
    x0 = (torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1).expand(20, -1, -1, -1)
    xt = library.q_sample(x0, t, torch.from_numpy(normal(5, Stream.BOUND, 3, 0, 1000, (1, 28, 28)))[t])
    with torch.inference_mode():
        mean_q, _, log_q = library.q_posterior(x0, xt, t)
        mean_p, _, log_p, _ = library.p_mean_variance(xt, t, clip_denoised=True)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean_q, (log_q / 2).exp()), torch.distributions.Normal(mean_p, (log_p / 2).exp())
        )
    theirs = sizes * kl.flatten(1).mean(1).numpy() / math.log(2)
    np.testing.assert_allclose(found.transitions[0], theirs, rtol=5e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_the_images_join_to_the_same_bytes(processes: int) -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    denoiser = Denoiser(lambda x, t: network(x), ABAR)
    images, edges = two_levels(10), strata(100, 15)

    def share(start: int, stop: int) -> Bound:
        return bound(denoiser, images[start:stop], first=start, seed=1, edges=edges)

    cuts = [10 * i // processes for i in range(processes + 1)]
    joined, whole = Bound.join([share(a, b) for a, b in pairwise(cuts)]), share(0, 10)
    for name in ("prior", "transitions", "reconstruction", "squared_error", "total"):
        assert getattr(joined, name).tobytes() == getattr(whole, name).tobytes()
    assert len(set(whole.total)) == 10


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)]
)
def test_what_is_no_image_is_refused(images: Any) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[n, height, width, channels\]; got"):
        bound(LINEAR, images, first=0, seed=0, edges=strata(100, 5))


def test_what_has_no_error_and_no_strata_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        mean_and_error(np.ones(1))
    with pytest.raises(ValueError, match="strata must lie between 1 and 99, one less than timesteps; got 100"):
        strata(100, 100)
