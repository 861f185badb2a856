"""Likelihoods along the probability-flow ODE (Song et al. 2021, section 4.3), which leaves no variances to choose.

The flow has a density, but pixels are whole numbers: noise is added, and what is known of it is taken off again. The
result is an upper bound of -log2 p(image), so a smaller one is better whatever the noise.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.randomness import Stream, generator
from diffusion.process.samplers import Denoiser, Predict
from diffusion.process.schedules import log_snr
from diffusion.statistics import bits_per_dim
from diffusion.statistics.bootstrap import Floats

STEPS = 100
"""Runge-Kutta steps in one dimension: the log density is then right to about 1e-5."""
IMAGE_STEPS = 20
"""The same for images: 80 network evaluations; twice as many move the mean by less than 0.002 bits per dimension."""


def log_likelihood(
    predict: Predict, x: Tensor, alphas_cumprod: Tensor, probe: Tensor | None = None, steps: int = STEPS
) -> Tensor:
    """log p(x) in nats of each of x [n, ...] under the model at t = 0, its smallest noise level; [n] in float64.

    In lambda = log(alpha / sigma) the ODE (Song et al. 2021, equation 13) is dx/dlambda = sigma^2 x - sigma eps(x, t),
    and d log p / dlambda = -div along it (equation 39), from the standard normal at t = T - 1. Both change slowly with
    lambda, so the classical Runge-Kutta method takes `steps` equal steps, of four calls of `predict` each, which takes
    and returns float64. The divergence is estimated by a `probe` of random signs, like x and the same all along the way
    (equation 40); None is ones, which is exact in one dimension.
    """
    lam = log_snr(alphas_cumprod.double().cpu())
    v = torch.ones_like(x, dtype=torch.float64) if probe is None else probe.double()
    timesteps = np.arange(len(lam), dtype=np.float64)

    def slope(at: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """dx/dlambda, and the divergence [n]."""
        # alpha^2 + sigma^2 = 1 and lambda = log(alpha / sigma), so sigma^2 = sigmoid(-2 lambda).
        sigma2 = 1 / (1 + math.exp(2 * at))
        # Reversed, because np.interp takes rising values, and lambda falls with t.
        t = float(np.interp(at, lam.numpy()[::-1], timesteps[::-1]))
        with torch.enable_grad():
            xt = x.clone().requires_grad_()
            eps = predict(xt, torch.full((len(x),), t, dtype=torch.float64))
            # Examples do not influence each other, so one pass for the sum gives v^T (d eps / d x) of each.
            (gradient,) = torch.autograd.grad((eps * v).sum(), xt)
        trace = (gradient * v).flatten(1).sum(1)
        return sigma2 * x - sigma2**0.5 * eps.detach(), sigma2 * x[0].numel() - sigma2**0.5 * trace

    x, change = x.double(), torch.zeros(len(x), dtype=torch.float64)
    edges = torch.linspace(float(lam[0]), float(lam[-1]), steps + 1, dtype=torch.float64).tolist()
    for start, end in pairwise(edges):
        h = end - start
        k1, d1 = slope(start, x)
        k2, d2 = slope(start + h / 2, x + h / 2 * k1)
        k3, d3 = slope(start + h / 2, x + h / 2 * k2)
        k4, d4 = slope(end, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        change += h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    # From the data to the noise, log p has changed by minus the integral of the divergence.
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1) + change


def bits(denoiser: Denoiser, images: NDArray[np.uint8], *, first: int, seed: int) -> Mapping[str, Floats]:
    """Bits per dimension of images [n, height, width, channels] whose indices are first, first + 1, ...: [n] each.

    `uniform` adds uniform noise as wide as a grey level, as flows do (Theis et al. 2016; Song et al. 2021).
    `model` adds the noise of t = 0, on which the network was trained, and decodes what that has covered as the bound of
    `bits_per_dim` does: -log p(x) <= E[log q(x_0 | x) - log p(x_0) - log p(x | x_0)]. It differs from that bound in the
    flow alone, which stands in place of reverse steps with fixed variances.
    """
    abar = denoiser.alphas_cumprod.double().cpu()
    a, b = float(abar[0].sqrt()), float((1 - abar[0]).sqrt())
    x0 = bits_per_dim.exactly_scaled(images)
    shape, size = tuple(x0.shape[1:]), x0[0].numel()
    sources = [generator(seed, Stream.FLOW, first + i) for i in range(len(x0))]
    # Signs, because of all probes with independent entries their estimate varies least (Hutchinson 1990).
    u, z, signs = (
        torch.from_numpy(np.stack([draw(source) for source in sources]))
        for draw in (
            lambda source: source.random(shape),
            lambda source: source.standard_normal(shape),
            lambda source: source.choice([-1.0, 1.0], shape),
        )
    )

    def predict_double(xt: Tensor, t: Tensor) -> Tensor:
        return denoiser.predict(xt.float(), t.float()).double()

    def log_density(xt: Tensor) -> Tensor:
        return log_likelihood(predict_double, xt, abar, signs, IMAGE_STEPS)

    width = 2 / 255  # of a grey level
    # x_0 = a x, so the density of x is that of x_0 times a for each dimension.
    uniform = log_density(a * (x0 + width * (u - 0.5))) + size * math.log(a * width)
    noisy = a * x0 + b * z
    log_q = torch.distributions.Normal(0.0, b).log_prob(b * z).flatten(1).sum(1)
    with torch.no_grad():
        x0_predicted = denoiser.clipped((noisy - b * predict_double(noisy, torch.zeros(len(x0)))) / a)
    decoder = bits_per_dim.log_likelihood(x0, x0_predicted, bits_per_dim.decoder_std(abar)).flatten(1).sum(1)
    nats = {"uniform": -uniform, "model": log_q - log_density(noisy) - decoder}
    return {name: (value / size / math.log(2)).numpy() for name, value in nats.items()}
