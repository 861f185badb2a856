"""Samples of a mixture against its exact density: distances with bootstrap intervals and simulated floors.

The distances themselves are exact. Their intervals and floors come from counts in `CELLS` cells of equal probability,
so that their cost does not grow with n.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.gaussian1d import distances
from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, generator
from diffusion.statistics.bootstrap import REPLICATES, Estimate, Resampled, resample
from diffusion.statistics.evaluator import Better

# A multiple of BINS, so that each bin is made of whole cells.
CELLS = 4096
BINS = 64
"""Number of bins of the histogram whose KL divergence is taken; they are equally probable, so that none stays empty."""
BLOCKS = 512
"""Number of blocks in the block bootstrap: neighbouring samples of a block are drawn again together."""

Floats = NDArray[np.float64]


class SampleMetric(NamedTuple):
    """A metric of samples against the exact mixture."""

    label: str
    exact: Callable[[Tensor, Mixture], float]
    """The metric of samples [n] themselves."""
    in_cells: Callable[["Grid", Floats], Floats]
    """The same of the shares of samples in the cells, [R, CELLS] to [R]."""
    better: Better = "lower"
    bounds: tuple[float, float] = (0, math.inf)


def metrics_of(mixture: Mixture) -> dict[str, SampleMetric]:
    """Returns the metrics by name; with a new row comes a new `metrics_version` in diffusion/problems/gaussian1d.py."""
    means = mixture.means.tolist()
    return {
        "w1": SampleMetric(
            "W1 to the exact mixture", distances.wasserstein1, lambda grid, shares: grid.gap(shares) @ grid.widths
        ),
        "ks": SampleMetric(
            "KS to the exact mixture", distances.kolmogorov_smirnov, lambda grid, shares: grid.gap(shares).max(1)
        ),
        "kl": SampleMetric(
            f"KL of the histogram, {BINS} bins",
            lambda x, mixture: distances.histogram_kl(x, mixture, BINS),
            lambda grid, shares: distances.kl_from_uniform(shares.reshape(len(shares), BINS, -1).sum(2)),
        ),
        **({f"share_{k}": _share_of_mode(k, mean) for k, mean in enumerate(means)} if len(means) > 1 else {}),
    }


def _share_of_mode(k: int, mean: float) -> SampleMetric:
    return SampleMetric(
        f"share of mode {mean:g}",
        lambda x, mixture: float(mixture.responsibilities(x.double()).mean(0)[k]),
        lambda grid, shares: (shares @ grid.responsibilities)[:, k],
        "near",
        (0, 1),
    )


def sample_metrics(
    x: Tensor, mixture: Mixture, seed: int, of_components: Sequence[int] | None = None
) -> dict[str, tuple[Estimate, Estimate]]:
    """(estimate, floor) of each metric of samples x [n], n at least 2.

    The floor is the same metric of n exact samples: the mean of simulations, and their spread. They have as many
    samples `of_components` [K] as are named, else as chance decides.
    """
    n, grid = len(x), Grid(mixture)
    parts = [(n, np.full(CELLS, 1 / CELLS))]  # all cells have the same probability
    if of_components is not None:
        parts = list(zip(of_components, grid.of_components, strict=True))
    own, perfect = _resampled_counts(grid.cells(x), seed) / n, _exact_counts(parts, seed) / n
    return {
        name: (
            Estimate.of(metric.exact(x, mixture), metric.in_cells(grid, own)),
            _floor(metric.in_cells(grid, perfect)),
        )
        for name, metric in metrics_of(mixture).items()
    }


def _floor(simulated: Floats) -> Estimate:
    return Estimate.of(float(simulated.mean()), simulated)


class Grid:
    """Cells of equal probability, which many samples can be counted in."""

    def __init__(self, mixture: Mixture) -> None:
        edges = mixture.quantile(torch.arange(1, CELLS, dtype=torch.float64) / CELLS)
        centres = mixture.quantile((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS)
        self._edges = edges.numpy()
        # How much of x each edge stands for, half the way to both neighbours: W1 is the integral of |F - F_exact| dx.
        self.widths = np.gradient(self._edges)
        below = torch.special.ndtr((edges[:, None] - mixture.means) / mixture.stds).numpy()  # [CELLS - 1, K]
        self.of_components = np.diff(below, axis=0, prepend=0, append=1).T
        """The probability of each cell under each component, [K, CELLS]."""
        self.responsibilities = mixture.responsibilities(centres).numpy()  # [CELLS, K]

    def cells(self, x: Tensor) -> NDArray[np.int64]:
        """Returns the cell of each sample, [n]."""
        return np.searchsorted(self._edges, x.double().numpy())

    def gap(self, shares: Floats) -> Floats:
        """Returns |F - F_exact| at the inner edges, [R, CELLS - 1], for shares [R, CELLS]."""
        return np.abs(shares.cumsum(1)[:, :-1] - np.arange(1, CELLS) / CELLS)


def _resampled_counts(cells: NDArray[np.int64], seed: int) -> Floats:
    """Draws how many of n samples fall into each cell in each replicate, [REPLICATES, CELLS]; a row sums to about n."""
    # Each block of neighbouring samples is counted once, [blocks, CELLS]. A replicate draws blocks and adds their rows,
    # so its cost does not depend on n.
    n = len(cells)
    blocks = min(n, BLOCKS)
    block = np.arange(n) * blocks // n
    counts = np.bincount(block * CELLS + cells, minlength=blocks * CELLS).reshape(blocks, CELLS).astype(np.float64)
    drawn = [resample(seed, i, Resampled.FAKE, blocks) for i in range(REPLICATES)]
    replicates = np.stack([np.bincount(chosen, minlength=blocks) for chosen in drawn]) @ counts
    # Blocks differ by one sample, so replicates may hold a few too many or too few.
    return replicates * (n / replicates.sum(1, keepdims=True))


def _exact_counts(parts: Sequence[tuple[int, Floats]], seed: int) -> Floats:
    """Draws the same for exact samples, so many of each of the distributions over the cells."""
    # The counts of each are multinomial; no sample has to be drawn.
    draws = []
    for i in range(REPLICATES):
        random = generator(seed, Stream.EVALUATION, i)
        draws.append(sum(random.multinomial(n, probabilities) for n, probabilities in parts))
    return np.stack(draws).astype(np.float64)
