"""Samplers against the exact denoiser, the exact end of the probability-flow ODE, and denoising-diffusion-pytorch."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor

from diffusion.gaussian1d.distances import wasserstein1, wasserstein1_floor
from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.process import samplers
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import (
    FUNCTIONS,
    Denoiser,
    Sampler,
    ddim,
    ddpm,
    dpm_solver,
    heun,
    posterior_variance,
    sde_dpm_solver,
    strided_timesteps,
)
from diffusion.process.schedules import alphas_cumprod
from diffusion.settings import SAMPLERS, DiffusionSettings, MixtureSettings, MlpSettings, SamplerSettings

MIXTURE = MixtureSettings(means=(-2.0, 0.0, 2.0), stds=(0.3, 0.5, 0.4), weights=(0.3, 0.4, 0.3))


def experiment(schedule: str = "linear") -> Gaussian1d:
    return Gaussian1d(MIXTURE, MlpSettings(), DiffusionSettings(beta_schedule=schedule))  # type: ignore[arg-type]


def perfect(exact: Gaussian1d) -> Denoiser:
    return Denoiser(exact.exact_predict, exact.abar)


def no_noise(k: int) -> Tensor:
    raise AssertionError("a deterministic sampler must not ask for noise")


def ode_error(sampler: Sampler, steps: int, schedule: str = "linear") -> float:
    """Mean distance to the exact end F_0^-1(F_T(x_T)) of the probability-flow ODE, from the quantiles of the noise."""
    exact = experiment(schedule)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    x_t = torch.special.ndtri(u)[:, None]
    end = exact.mixture.quantile(exact.mixture.at(float(exact.abar[-1])).cdf(x_t))
    *_, x0 = sampler(perfect(exact), x_t, steps=steps, noise=no_noise)
    return float((x0 - end).abs().mean())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2), (heun, 2)])
def test_the_error_to_the_exact_ode_has_the_samplers_order(sampler: Sampler, order: int, schedule: str) -> None:
    coarse, fine = ode_error(sampler, 40, schedule), ode_error(sampler, 160, schedule)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.2)


def test_heun_is_as_exact_with_an_even_number_of_evaluations_as_with_an_odd_one() -> None:
    assert ode_error(heun, 60) == pytest.approx(ode_error(heun, 61), rel=0.05)


@pytest.mark.parametrize(("steps", "largest"), [(10, 0.2), (50, 0.05), (100, 0.025)])
def test_ddim_is_as_close_to_the_mixture_as_it_is_known_to_be(steps: int, largest: float) -> None:
    assert largest / 4 < ode_error(ddim, steps) < largest


@pytest.mark.parametrize(
    ("name", "steps"), [("ddpm", 1000), ("ddim", 400), ("dpm++", 50), ("heun", 100), ("sde-dpm++", 200)]
)
def test_with_the_exact_denoiser_samplers_draw_the_mixture(name: str, steps: int) -> None:
    exact, n = experiment(), 4_000
    x_t = torch.from_numpy(normal(0, Stream.SAMPLE_START, 0, 0, n, (1,)))

    def noise(k: int) -> Tensor:
        return torch.from_numpy(normal(0, Stream.SAMPLE_STEP, k, 0, n, (1,)))

    *_, x0 = FUNCTIONS[name](perfect(exact), x_t, steps=steps, noise=noise)
    assert wasserstein1(x0[:, 0], exact.mixture) < 2.5 * wasserstein1_floor(exact.mixture, n)


def variance_error(sampler: Sampler, steps: int, schedule: str) -> float:
    """How far the variance of what it draws is from that of a standard normal, whose denoiser is linear.

    So a sample is a sum of independent noises. Its coefficients are what comes of the unit vectors.
    """
    gaussian = Gaussian1d(
        MixtureSettings(means=(0.0,), stds=(1.0,), weights=(1.0,)),
        MlpSettings(),
        DiffusionSettings(beta_schedule=schedule),  # type: ignore[arg-type]
    )
    start, *of_steps = torch.eye(steps + 1, dtype=torch.float64)[:, :, None]
    *_, coefficients = sampler(perfect(gaussian), start, steps=steps, noise=lambda k: of_steps[k])
    return abs(float(coefficients.square().sum()) - 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [(ddpm, 1), (sde_dpm_solver, 2)])
def test_the_error_of_the_variance_has_the_samplers_order(sampler: Sampler, order: int, schedule: str) -> None:
    coarse, fine = variance_error(sampler, 250, schedule), variance_error(sampler, 500, schedule)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_where_each_prediction_is_the_same_and_noise_is_one_the_second_order_is_ddpm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samplers, "NOISE", 1.0)
    exact, known, n = experiment(), 1.5, 20
    x_t, *noises = torch.from_numpy(normal(0, Stream.SAMPLE_STEP, 0, 0, 11, (n, 1))).double()

    def predict(xt: Tensor, t: Tensor) -> Tensor:
        abar = exact.abar[t.long()][:, None]
        return (xt - abar**0.5 * known) / (1 - abar) ** 0.5

    drawn = [
        list(sampler(Denoiser(predict, exact.abar), x_t, steps=10, noise=lambda k: noises[k]))
        for sampler in (ddpm, sde_dpm_solver)
    ]
    torch.testing.assert_close(*map(torch.stack, drawn), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_second_order_is_that_of_k_diffusions_formula(schedule: str) -> None:
    """As `sample_dpmpp_2m_sde` writes it with the midpoint rule: for x / alpha, whose noise is sigma = exp(-lambda)."""
    exact, n, steps, eta = experiment(schedule), 40, 20, samplers.NOISE
    x_t, *noises = torch.from_numpy(normal(0, Stream.SAMPLE_STEP, 0, 0, steps + 1, (n, 1))).double()
    denoiser = Denoiser(exact.exact_predict, exact.abar, clip=(-1, 1))
    *_, found = sde_dpm_solver(denoiser, x_t, steps=steps, noise=lambda k: noises[k])

    times = strided_timesteps(1000, steps)
    abars = [float(exact.abar[t]) for t in times]
    sigmas = [math.sqrt((1 - abar) / abar) for abar in abars]
    x, before, h_before = x_t / abars[0] ** 0.5, None, math.nan
    for k in range(steps - 1):
        denoised, _ = denoiser(x * abars[k] ** 0.5, times[k], abars[k])
        h = math.log(sigmas[k] / sigmas[k + 1])
        x = sigmas[k + 1] / sigmas[k] * math.exp(-h * eta) * x - math.expm1(-h - eta * h) * denoised
        if before is not None:
            x = x - 0.5 * math.expm1(-h - eta * h) * h / h_before * (denoised - before)
        x = x + noises[k] * sigmas[k + 1] * math.sqrt(-math.expm1(-2 * eta * h))
        before, h_before = denoised, h
    known, _ = denoiser(x * abars[-1] ** 0.5, times[-1], abars[-1])
    torch.testing.assert_close(found, known, rtol=1e-6, atol=1e-6)


def test_the_table_and_the_functions_have_the_same_names() -> None:
    assert list(FUNCTIONS) == list(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_noise_where_the_table_says_so(name: str) -> None:
    exact, asked = experiment(), []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return torch.zeros(3, 1)

    for eta in (0.0, 0.5) if SAMPLERS[name].takes_eta else (0.0,):
        asked.clear()
        settings = SamplerSettings(sampler=name, steps=4, eta=eta)
        list(FUNCTIONS[name](perfect(exact), torch.zeros(3, 1), steps=4, noise=noise, eta=eta))
        assert bool(asked) != settings.is_deterministic


def test_ddim_with_eta_one_equals_ddpm() -> None:
    exact, n = experiment(), 50
    x_t = torch.from_numpy(normal(0, Stream.SAMPLE_START, 0, 0, n, (1,))).double()

    def noise(k: int) -> Tensor:
        return torch.from_numpy(normal(0, Stream.SAMPLE_STEP, k, 0, n, (1,))).double()

    for a, b in zip(
        ddim(perfect(exact), x_t, steps=100, noise=noise, eta=1.0),
        ddpm(perfect(exact), x_t, steps=100, noise=noise),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("t", "t_prev", "known"),
    [(487, 486, 0.0097916), (999, 998, 0.0199998), (420, 400, 0.14772), (980, 960, 0.32461)],
)
def test_variances_have_their_known_values(t: int, t_prev: int, known: float) -> None:
    abar = alphas_cumprod("linear", 1000)
    assert posterior_variance(float(abar[t]), float(abar[t_prev])) == pytest.approx(known, rel=2e-4)
    assert posterior_variance(float(abar[0]), 1.0) == 0


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 333, 1000])
def test_timesteps_start_at_the_noisiest_and_are_as_many_as_asked_for(steps: int) -> None:
    times = strided_timesteps(1000, steps)
    assert times[0] == 999
    assert len(set(times)) == len(times) == steps
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("sampler", FUNCTIONS.values())
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_counts_network_evaluations(sampler: Sampler, steps: int) -> None:
    exact, calls = experiment(), []

    def predict(xt: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return exact.exact_predict(xt, t)

    xs = list(sampler(Denoiser(predict, exact.abar), torch.zeros(3, 1), steps=steps, noise=lambda k: torch.zeros(3, 1)))
    assert len(calls) == len(xs) == steps


@pytest.fixture(scope="module")
def library_model() -> GaussianDiffusion:
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=1)
    return GaussianDiffusion(unet, image_size=28, objective="pred_noise", beta_schedule="linear").eval()


def ours_for(model: GaussianDiffusion) -> Denoiser:
    return Denoiser(lambda x, t: model.model(x, t), model.alphas_cumprod.double(), clip=(-1, 1))


class RecordedNoise:
    """Stands in for torch.randn_like in the library and gives the same noise to our samplers."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __call__(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(self.drawn))
        self.drawn.append(torch.randn(like.shape, generator=generator))
        return self.drawn[-1]


def library_noise() -> "mock._patch[Callable[[Tensor], Tensor]]":
    return mock.patch("denoising_diffusion_pytorch.denoising_diffusion_pytorch.torch.randn_like", RecordedNoise())


def test_ancestral_steps_equal_the_librarys_p_sample(library_model: GaussianDiffusion) -> None:
    x_t = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with library_noise() as recorded, torch.inference_mode():
        ours = ddpm(ours_for(library_model), x_t, steps=1000, noise=lambda k: recorded.drawn[k])
        theirs = x_t
        for t in [999, 998, 997]:
            theirs, _ = library_model.p_sample(theirs, t)
            torch.testing.assert_close(next(ours), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_equals_the_librarys_ddim_sample(library_model: GaussianDiffusion, eta: float) -> None:
    library_model.sampling_timesteps, library_model.ddim_sampling_eta = 7, eta
    x_t = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with (
        library_noise() as recorded,
        mock.patch("denoising_diffusion_pytorch.denoising_diffusion_pytorch.torch.randn", return_value=x_t),
        torch.inference_mode(),
    ):
        theirs = library_model.ddim_sample((2, 1, 28, 28), return_all_timesteps=True)
        ours = ddim(ours_for(library_model), x_t, steps=7, noise=lambda k: recorded.drawn[k], eta=eta)
        for i, x in enumerate(ours):
            torch.testing.assert_close((x + 1) / 2, theirs[:, i + 1], rtol=0, atol=2e-5)
