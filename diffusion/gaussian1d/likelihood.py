"""The log-likelihood of a 1D model, which can be computed exactly along the probability-flow ODE."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.process.samplers import Predict
from diffusion.process.schedules import log_snr

TOLERANCE = 1e-5
"""The relative error that a step may have; the log density is then right to about 1e-4."""


def log_likelihood(predict: Predict, x: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """log p(x) in nats of each of x [n] under the model at t = 0, its smallest noise level; float64, as `predict` must.

    In lambda = log(alpha / sigma) the ODE (Song et al. 2021, equation 13) is dx/dlambda = sigma^2 x - sigma eps(x, t),
    and d log p / dlambda = -div along it (equation 39), from the standard normal at t = T - 1.
    """
    lam = log_snr(alphas_cumprod.double()).numpy()
    t_of = np.arange(len(lam), dtype=np.float64)
    n = len(x)

    def slope(at: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        sigma = float(torch.sigmoid(torch.tensor(-2 * at, dtype=torch.float64)).sqrt())
        t = float(np.interp(at, lam[::-1], t_of[::-1]))
        xt = torch.from_numpy(state[:n]).requires_grad_()
        eps = predict(xt[:, None], torch.full((n,), t, dtype=torch.float64))[:, 0]
        # Points do not influence each other, so one pass for the sum gives d eps / d x of each.
        (gradient,) = torch.autograd.grad(eps.sum(), xt)
        dx = sigma**2 * xt.detach() - sigma * eps.detach()
        divergence = sigma**2 - sigma * gradient
        return torch.cat([dx, divergence]).numpy()

    start = np.concatenate([x.double().numpy(), np.zeros(n)])
    solution = solve_ivp(slope, (lam[0], lam[-1]), start, "DOP853", t_eval=[lam[-1]], rtol=TOLERANCE, atol=1e-8)
    if not solution.success:
        raise RuntimeError(f"the probability-flow ODE could not be solved: {solution.message}")
    noise, change = np.split(solution.y[:, -1], 2)  # the integral of div, from the data to the noise
    return torch.distributions.Normal(0.0, 1.0).log_prob(torch.from_numpy(noise)) + torch.from_numpy(change)
