"""A Gaussian mixture under the forward process: every quantity a diffusion model estimates, in closed form.

p_0 = sum_k w_k N(mu_k, s_k^2) becomes p_t = sum_k w_k N(a mu_k, v_k) with a = sqrt(abar), b = sqrt(1 - abar) and
v_k = a^2 s_k^2 + b^2. Below, x is [...] and abar broadcasts against it; a trailing axis [K] runs over components.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.settings import MixtureSettings


@dataclass(frozen=True)
class Mixture:
    """p_0 by its means, stds and weights, each [K] in float64."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    @staticmethod
    def of(settings: MixtureSettings) -> "Mixture":
        means, stds, weights = (
            torch.tensor(values, dtype=torch.float64) for values in (settings.means, settings.stds, settings.weights)
        )
        return Mixture(means, stds, weights)

    def at(self, abar: float) -> "Mixture":
        """The marginal p_t, which is a mixture again."""
        return Mixture(math.sqrt(abar) * self.means, torch.sqrt(abar * self.stds**2 + 1 - abar), self.weights)

    def of_classes(self, shares: Tensor) -> "Mixture":
        """The mixture of the same components with other weights, [K]; those with none are left out."""
        there = shares > 0
        return Mixture(self.means[there], self.stds[there], shares[there].double() / shares.sum())

    def pdf(self, x: Tensor) -> Tensor:
        """p_0(x)."""
        return self._log_joint(x, torch.tensor(1.0)).logsumexp(-1).exp()

    def cdf(self, x: Tensor) -> Tensor:
        """F_0(x) = sum_k w_k Phi((x - mu_k) / s_k)."""
        return (self.weights * torch.special.ndtr((x[..., None] - self.means) / self.stds)).sum(-1)

    def quantile(self, u: Tensor) -> Tensor:
        """F_0^-1(u) by bisection, to the last bits of float64; u is [...] in (0, 1)."""
        reach = 40 * self.stds.max()  # where Phi is 0 or 1 in float64
        low = torch.full_like(u, float(self.means.min() - reach), dtype=torch.float64)
        high = torch.full_like(u, float(self.means.max() + reach), dtype=torch.float64)
        for _ in range(64):
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def partial_mean(self, x: Tensor) -> Tensor:
        """E[x_0; x_0 <= x], the integral of the quantile function from 0 to F_0(x)."""
        # For one component N(mu, s^2) it is mu Phi(z) - s phi(z).
        z = (x[..., None] - self.means) / self.stds
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        return (self.weights * (self.means * torch.special.ndtr(z) - self.stds * density)).sum(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """The probability that x [...] comes from each component, [..., K]; its mean over p_0 is `weights`."""
        return self._log_joint(x, torch.tensor(1.0)).softmax(-1)

    def entropy(self) -> float:
        """-E log p_0(x) in nats, by quadrature."""
        x, weight = self.quadrature(torch.ones(1, dtype=torch.float64), 20_001)
        return -float((weight * self._log_joint(x, torch.tensor(1.0)).logsumexp(-1)).sum())

    def sample(self, uniforms: Tensor, normals: Tensor) -> Tensor:
        """Draws [n] from p_0, given [n] uniforms on [0, 1), which choose the component, and [n] standard normals."""
        k = self.components(uniforms)
        return self.means[k] + self.stds[k] * normals

    def components(self, uniforms: Tensor) -> Tensor:
        """The components that `sample` draws for the same uniforms, [n]."""
        # Without the last sum, which may be rounded to less than 1.
        return torch.searchsorted(self.weights.cumsum(0)[:-1], uniforms.double(), right=True)

    def eps(self, xt: Tensor, abar: Tensor) -> Tensor:
        """The best possible noise prediction E[eps | x_t] = b sum_k r_k z_k / v_k, which is -b times the score."""
        r, z, v = self._posterior(xt, abar)
        return torch.sqrt(1 - abar) * (r * z / v).sum(-1)

    def eps_of_class(self, xt: Tensor, abar: Tensor, classes: Tensor) -> Tensor:
        """The same where the component k [...] of each x is known, E[eps | x_t, k] = b z_k / v_k; K is unknown."""
        z, v = self._z_v(xt, abar)
        known = torch.sqrt(1 - abar)[..., None] * z / v
        every = torch.cat([known, self.eps(xt, abar)[..., None]], -1)  # [..., K + 1]
        return every.gather(-1, classes[..., None])[..., 0]

    def eps_variance(self, xt: Tensor, abar: Tensor) -> Tensor:
        """Var(eps | x_t), the part of the noise that no network can know."""
        # Given its component, eps has mean b z / v and variance a^2 s^2 / v; this is the law of total variance.
        r, z, v = self._posterior(xt, abar)
        a2, b2 = abar[..., None], (1 - abar)[..., None]
        return (r * (a2 * self.stds**2 / v + b2 * z**2 / v**2)).sum(-1) - self.eps(xt, abar) ** 2

    def loss_floor(self, abar: Tensor, points: int = 801) -> Tensor:
        """L*_t = E[Var(eps | x_t)], the smallest reachable loss at each abar; [T] -> [T], by quadrature."""
        x, weight = self.quadrature(abar, points)  # [T, points]
        return (weight * self.eps_variance(x, abar[:, None])).sum(-1)

    def quadrature(self, abar: Tensor, points: int) -> tuple[Tensor, Tensor]:
        """Nodes x_t and weights p_t(x_t) dx, both [T, points], for expectations over p_t at each of abar [T]."""
        a = torch.sqrt(abar)[:, None]
        std = torch.sqrt(abar * self.stds.max() ** 2 + 1 - abar)[:, None]
        low, high = a * self.means.min() - 8 * std, a * self.means.max() + 8 * std
        # Equal distances: for a smooth density that vanishes at both ends, that converges faster than any power of
        # 1 / points. dx is left out, because the weights are normalised.
        x = low + (high - low) * torch.linspace(0, 1, points, dtype=torch.float64)
        weight = self._log_joint(x, abar[:, None]).logsumexp(-1).exp()
        return x, weight / weight.sum(-1, keepdim=True)

    def _log_joint(self, xt: Tensor, abar: Tensor) -> Tensor:
        """log w_k + log N(x_t; a mu_k, v_k), [..., K]."""
        z, v = self._z_v(xt, abar)
        return torch.log(self.weights) - 0.5 * (z**2 / v + torch.log(2 * math.pi * v))

    def _posterior(self, xt: Tensor, abar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities r_k, residuals z_k and variances v_k, each [..., K]."""
        # From logs, because far from all components every density is rounded to 0, and their shares would be 0 / 0.
        return (self._log_joint(xt, abar).softmax(-1), *self._z_v(xt, abar))

    def _z_v(self, xt: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        a2 = abar[..., None]
        return xt[..., None] - torch.sqrt(a2) * self.means, a2 * self.stds**2 + 1 - a2
