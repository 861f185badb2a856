"""Samples of a mixture against its exact density: distances with bootstrap intervals and simulated floors.

The distances themselves are exact. Their intervals and floors come from counts in `CELLS` cells of equal probability,
so that their cost does not grow with n.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.gaussian1d import distances
from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, generator
from diffusion.statistics.bootstrap import REPLICATES, Estimate, Resampled, resample

CELLS = 4096
BINS = 64
"""Number of bins of the histogram whose KL divergence is taken; they are equally probable, so that none stays empty."""
BLOCKS = 512
"""Number of blocks in the block bootstrap: neighbouring samples of a block are drawn again together."""

Floats = NDArray[np.float64]


def sample_metrics(x: Tensor, mixture: Mixture, seed: int) -> dict[str, tuple[Estimate, Estimate]]:
    """(estimate, floor) of each metric of samples x [n], n at least 2: w1, ks, kl, and share_k of each component k.

    The floor is the same metric of n exact samples: the mean of simulations, and their spread.
    """
    n, grid = len(x), _Grid(mixture)
    exact = {
        "w1": distances.wasserstein1(x, mixture),
        "ks": distances.kolmogorov_smirnov(x, mixture),
        "kl": distances.histogram_kl(x, mixture, BINS),
        **{f"share_{k}": float(share) for k, share in enumerate(mixture.responsibilities(x.double()).mean(0))},
    }
    replicates = grid.distances(_resampled_counts(grid.cells(x), seed) / n)
    floors = grid.distances(_exact_counts(n, seed) / n)
    return {name: (Estimate.of(exact[name], replicates[name]), _floor(floors[name])) for name in exact}


def _floor(simulated: Floats) -> Estimate:
    return Estimate.of(float(simulated.mean()), simulated)


class _Grid:
    """Cells of equal probability, and the metrics as functions of the share of samples in each."""

    def __init__(self, mixture: Mixture) -> None:
        edges = mixture.quantile(torch.arange(1, CELLS, dtype=torch.float64) / CELLS)
        centres = mixture.quantile((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS)
        self._edges = edges.numpy()
        self._widths = np.gradient(self._edges)
        self._responsibilities = mixture.responsibilities(centres).numpy()  # [CELLS, K]

    def cells(self, x: Tensor) -> NDArray[np.int64]:
        """Returns the cell of each sample, [n]."""
        return np.searchsorted(self._edges, x.double().numpy())

    def distances(self, shares: Floats) -> dict[str, Floats]:
        """Each metric, [R], for shares [R, CELLS]."""
        gap = np.abs(shares.cumsum(1)[:, :-1] - np.arange(1, CELLS) / CELLS)
        bins = shares.reshape(len(shares), BINS, -1).sum(2)
        modes = shares @ self._responsibilities
        return {
            "w1": gap @ self._widths,
            "ks": gap.max(1),
            "kl": distances.kl_from_uniform(bins),
            **{f"share_{k}": modes[:, k] for k in range(modes.shape[1])},
        }


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


def _exact_counts(n: int, seed: int) -> Floats:
    """Draws the same for n exact samples."""
    # All cells have the same probability, so the counts are multinomial; no sample has to be drawn.
    uniform = np.full(CELLS, 1 / CELLS)
    draws = [generator(seed, Stream.EVALUATION, i).multinomial(n, uniform) for i in range(REPLICATES)]
    return np.stack(draws).astype(np.float64)
