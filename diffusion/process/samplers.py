"""Samplers lead from noise to data, with any network that predicts eps.

All share one signature. `xt` [batch, ...] is the noise that they start from. `steps` is the number of network
evaluations. `noise(k)` is the standard normal noise of step k, shaped like xt. A sampler yields x after each
evaluation; the last one is the sample.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.process.schedules import log_snr

Predict = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Clip = tuple[float, float]

RHO = 7.0
"""Spaces the steps of `heun`, as Karras et al. 2022 found best."""
NOISE = 2.0
"""The noise of `sde-dpm++`, tau^2 of SA-Solver (Xue et al. 2023): 0 is the probability-flow ODE, 1 as random as `ddpm`.

With a perfect network and many steps all draw the same distribution. For one that has been trained for minutes, 2 was
the best (benchmarks/README.md).
"""


@dataclass(frozen=True)
class Denoiser:
    """A network's predictions of x0 and eps, for the noise that it was trained on."""

    predict: Predict
    """Takes xt [batch, ...] and t [batch], which may be fractional, and returns eps."""
    alphas_cumprod: Tensor
    """[T] in float64."""
    clip: Clip | None = None
    """Bounds every prediction of x0 where the data are bounded."""

    def __call__(self, xt: Tensor, t: float, abar: float) -> tuple[Tensor, Tensor]:
        """Returns x0 and eps; where x0 is clipped, eps is changed so that both still make up xt."""
        # Autocast may have made eps shorter.
        eps = self.predict(xt, torch.full((len(xt),), t, device=xt.device)).to(xt.dtype)
        x0 = self.clipped((xt - (1 - abar) ** 0.5 * eps) / abar**0.5)
        if self.clip is not None:
            eps = (xt - abar**0.5 * x0) / (1 - abar) ** 0.5
        return x0, eps

    def clipped(self, x0: Tensor) -> Tensor:
        """Returns a prediction of x0 within the bounds, if there are some."""
        return x0 if self.clip is None else x0.clamp(*self.clip)


class Sampler(Protocol):
    """The signature that the samplers share."""

    def __call__(
        self, denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0
    ) -> Iterator[Tensor]: ...


def ddpm(denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """Ancestral sampling with the posterior variance (DDPM, algorithm 2 and equation 7); eta is not used.

    With fewer steps than T, alpha_t is the ratio of neighbouring alpha_bar (Improved DDPM, section 4).
    """
    for k, (t, abar, abar_prev) in enumerate(_strides(denoiser.alphas_cumprod, steps)):
        alpha = abar / abar_prev
        _, eps = denoiser(xt, t, abar)
        # Equation 11: equation 7's mean, x0 written by eps, which the denoiser has changed where it clipped x0.
        mu = (xt - (1 - alpha) / (1 - abar) ** 0.5 * eps) / alpha**0.5
        sigma = posterior_variance(abar, abar_prev) ** 0.5
        # The last step ends at the data, where sigma is 0: it asks for no noise.
        xt = mu + sigma * noise(k) if sigma > 0 else mu
        yield xt


def ddim(denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """Denoising diffusion implicit models (Song et al. 2021), equation 12."""
    for k, (t, abar, abar_prev) in enumerate(_strides(denoiser.alphas_cumprod, steps)):
        x0, eps = denoiser(xt, t, abar)
        sigma = eta * posterior_variance(abar, abar_prev) ** 0.5
        # eps makes room for the noise: together they have 1 - abar_prev, the variance of the marginal after the step.
        xt = abar_prev**0.5 * x0 + (1 - abar_prev - sigma**2) ** 0.5 * eps
        if sigma > 0:
            xt = xt + sigma * noise(k)
        yield xt


def dpm_solver(denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022), algorithm 2, evenly spaced in log-SNR; eta and noise are unused."""
    t, lam = _log_snr_grid(denoiser.alphas_cumprod, steps)
    # alpha^2 + sigma^2 = 1 and lambda = log(alpha / sigma), so alpha^2 = sigmoid(2 lambda).
    alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    previous: Tensor | None = None
    for i in range(steps):
        x0, _ = denoiser(xt, float(t[i]), float(alpha[i] ** 2))
        if i == steps - 1:  # the last step goes to lambda = infinity, where only the first order is stable: x = x0
            yield x0
            return
        h = float(lam[i + 1] - lam[i])
        if previous is None:
            d = x0  # a line takes two predictions, so the first step is of first order
        else:
            # Second order: x0 is continued along the line through its last two predictions, to half a step ahead.
            r = float(lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        # expm1, because exp(-h) - 1 loses digits where many steps make h small.
        xt = float(sigma[i + 1] / sigma[i]) * xt - float(alpha[i + 1] * torch.expm1(torch.tensor(-h))) * d
        previous = x0
        yield xt


def sde_dpm_solver(denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022) with NOISE, between the timesteps of `ddpm`; eta is not used.

    k-diffusion calls NOISE the eta of its `sample_dpmpp_2m_sde`. With NOISE 1, and x0 in place of the line through its
    last two predictions, it is `ddpm`.
    """
    before: tuple[float, Tensor] | None = None
    for k, (t, abar, abar_prev) in enumerate(_strides(denoiser.alphas_cumprod, steps)):
        x0, _ = denoiser(xt, t, abar)
        if abar_prev == 1:  # the last step goes to lambda = infinity, where only the first order is stable: x = x0
            yield x0
            return
        # exp(-h), where h is how far the step goes in lambda = log(alpha / sigma).
        shrinks = (abar / abar_prev * (1 - abar_prev) / (1 - abar)) ** 0.5
        h, d = -math.log(shrinks), x0
        if before is not None:
            d = x0 + h / (2 * before[0]) * (x0 - before[1])  # half a step ahead, as in `dpm_solver`
        kept = ((1 - abar_prev) / (1 - abar)) ** 0.5 * shrinks**NOISE
        fresh = ((1 - abar_prev) * (1 - shrinks ** (2 * NOISE))) ** 0.5
        xt = kept * xt + abar_prev**0.5 * (1 - shrinks ** (1 + NOISE)) * d + fresh * noise(k)
        before = h, x0
        yield xt


def heun(denoiser: Denoiser, xt: Tensor, *, steps: int, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """Heun's method for the probability-flow ODE (Karras et al. 2022, algorithm 1); eta and noise are unused.

    In y = x / alpha and s = sigma / alpha the ODE is dy / ds = eps. Each step takes two evaluations, the last one, to
    s = 0, a single one (Euler's). If `steps` is even, so does the first, where the ODE is nearly straight.
    """
    t, lam = _log_snr_grid(denoiser.alphas_cumprod, steps // 2 + 1, RHO)
    alpha, s = torch.sigmoid(2 * lam).sqrt(), torch.exp(-lam)
    for i in range(steps // 2 + 1):
        x0, slope = denoiser(xt, float(t[i]), float(alpha[i] ** 2))
        if i == steps // 2:
            yield x0
            return
        h = float(s[i + 1] - s[i])
        euler = float(alpha[i + 1]) * (xt / float(alpha[i]) + h * slope)
        yield euler
        if i == 0 and steps % 2 == 0:
            xt = euler
            continue
        # The mean of the slopes at both ends of the step is a trapezoidal rule: second order, at twice the price.
        _, slope_after = denoiser(euler, float(t[i + 1]), float(alpha[i + 1] ** 2))
        xt = float(alpha[i + 1]) * (xt / float(alpha[i]) + h * (slope + slope_after) / 2)
        yield xt


FUNCTIONS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++": dpm_solver,
    "heun": heun,
    "sde-dpm++": sde_dpm_solver,
}
"""The function of each row of diffusion.settings.SAMPLERS."""


def posterior_variance(abar: float, abar_prev: float) -> float:
    """Var(x_prev | x_t, x_0) (DDPM, equation 7), also between timesteps that are not neighbours (DDIM, equation 16)."""
    return (1 - abar / abar_prev) * (1 - abar_prev) / (1 - abar)


def strided_timesteps(timesteps: int, steps: int) -> list[int]:
    """Returns `steps` timesteps from T-1 downwards, evenly spaced as in denoising-diffusion-pytorch's `ddim_sample`."""
    # From -1, which stands for the data, up to T-1; reversed, without the -1.
    return torch.linspace(-1, timesteps - 1, steps + 1).int().tolist()[:0:-1]


def _strides(alphas_cumprod: Tensor, steps: int) -> Iterator[tuple[int, float, float]]:
    """Yields (t, alpha_bar before the step, alpha_bar after it) for each step; the last one ends at 1, the data."""
    times = strided_timesteps(len(alphas_cumprod), steps)
    abar = [float(alphas_cumprod[t]) for t in times]
    return zip(times, abar, [*abar[1:], 1.0], strict=True)


def _log_snr_grid(alphas_cumprod: Tensor, steps: int, rho: float = math.inf) -> tuple[Tensor, Tensor]:
    """Fractional timesteps from the noisiest to 0 and their log-SNR, both [steps] in float64.

    Evenly spaced in log-SNR; with a finite rho in (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5). Starts
    where the log-SNR is at least -5.1: below lies pure noise, where the cosine schedule would waste its steps.
    """
    lam = log_snr(alphas_cumprod.double())
    # -5.1 is the bound of DPM-Solver's reference code for the cosine schedule.
    first, last = max(float(lam[-1]), -5.1), float(lam[0])
    grid = torch.linspace(first, last, steps, dtype=torch.float64)
    if rho < math.inf:
        roots = torch.linspace(math.exp(-first / rho), math.exp(-last / rho), steps, dtype=torch.float64)
        # exp and log need not give back the ends exactly, and beyond them there is no timestep.
        grid = (-rho * roots.log()).clamp(first, last)
    ascending, noisy_first = lam.flip(0), len(lam) - 1
    # lambda falls with t, but searchsorted needs it to rise: place p of `ascending` is timestep T - 1 - p. Each value
    # of the grid lies between two places, `upper` - 1 and `upper`; linear interpolation gives its fractional place.
    upper = torch.searchsorted(ascending, grid).clamp(1, noisy_first)
    fraction = (grid - ascending[upper - 1]) / (ascending[upper] - ascending[upper - 1])
    return noisy_first - (upper - 1 + fraction), grid
