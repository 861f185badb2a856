"""Splits the error of samples into the sampler's and the network's; in one dimension both can be measured.

The exact denoiser with the same sampler, steps and noise has only the sampler's error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.gaussian1d.distances import wasserstein1, wasserstein1_floor
from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import FUNCTIONS, Denoiser
from diffusion.settings import SamplerSettings

SUB_BATCH = 4096
EVALUATIONS = 16_384_000
"""At most this many network evaluations per sampler: with many steps, fewer samples are drawn."""


@dataclass(frozen=True)
class SamplerErrors:
    """W1 distances of a sampler's results."""

    total: float
    """Distance of the network's samples to the exact answer."""
    sampler_alone: float
    """Distance of the exact denoiser's samples to the exact answer."""
    network_alone: float
    """Distance of the network's samples to the exact denoiser's, from the same noise."""
    floor: float
    """Distance of as many exact samples to the exact answer; 0 for a sampler without chance in it."""
    n: int


@torch.inference_mode()
def sampler_errors(denoiser: Denoiser, exact: Denoiser, mixture: Mixture, settings: SamplerSettings) -> SamplerErrors:
    """The errors of a denoiser, and of the exact one, with these settings.

    A deterministic sampler starts from the grid x_T = Phi^-1((i - 0.5) / N). The probability-flow ODE keeps F_t(x_t)
    constant, so it must end at F_0^-1(F_T(x_T)), and the error has no chance in it. Samples of the others are compared
    with the mixture.
    """
    if settings.is_deterministic:
        n = SUB_BATCH
        start = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
        end = mixture.quantile(mixture.at(float(exact.alphas_cumprod[-1])).cdf(start))
        own, perfect = _draw(denoiser, start, settings, 0), _draw(exact, start, settings, 0)
        return SamplerErrors(_between(own, end), _between(perfect, end), _between(own, perfect), 0.0, n)
    batches = max(1, min(5, EVALUATIONS // (settings.steps * SUB_BATCH)))
    starts = [torch.from_numpy(normal(0, Stream.EVALUATION, 0, *_rows(i))).double() for i in range(batches)]
    own = torch.cat([_draw(denoiser, x, settings, i) for i, x in enumerate(starts)])
    perfect = torch.cat([_draw(exact, x, settings, i) for i, x in enumerate(starts)])
    n = len(own)
    distances = wasserstein1(own, mixture), wasserstein1(perfect, mixture), _between(own, perfect)
    return SamplerErrors(*distances, wasserstein1_floor(mixture, n), n)


def _draw(denoiser: Denoiser, start: Tensor, settings: SamplerSettings, batch: int) -> Tensor:
    """Draws samples [SUB_BATCH] from the noise `start`, in float32 as `sample` does."""

    def noise(step: int) -> Tensor:
        # + 1, because the numbers of step 0 are the start.
        return torch.from_numpy(normal(0, Stream.EVALUATION, step + 1, *_rows(batch), (1,)))

    draw, xt = FUNCTIONS[settings.sampler], start.float()[:, None]
    *_, x0 = draw(denoiser, xt, steps=settings.steps, noise=noise, eta=settings.eta)
    return x0[:, 0].double()


def _rows(batch: int) -> tuple[int, int]:
    return batch * SUB_BATCH, (batch + 1) * SUB_BATCH


def _between(a: Tensor, b: Tensor) -> float:
    """W1 between two sets of equal size."""
    # In one dimension the cheapest transport keeps the order.
    return float((a.sort().values - b.sort().values).abs().mean())
