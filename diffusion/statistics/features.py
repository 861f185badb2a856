"""Distances between two sets of images in a feature space: Frechet and kernel distance, and how the sets overlap.

`real` and `fake` are features [n, d] and [m, d]; otherwise ValueError. All values depend on n: compare them with the
floor, the value of other real images of the same n. Choose real images at random, because MNIST is sorted by writer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.statistics.bootstrap import REPLICATES, Estimate, Floats, Resampled, mean, resample

_CHUNK = 500


def frechet_distance(real: NDArray[Any], fake: NDArray[Any], *, seed: int) -> Estimate:
    """`frechet` with an interval; biased upwards by order 1/n (Chong & Forsyth 2020)."""
    real, fake = _checked(real, fake, 2)
    replicates = [
        frechet(real[resample(seed, i, Resampled.REAL, len(real))], fake[resample(seed, i, Resampled.FAKE, len(fake))])
        for i in range(REPLICATES)
    ]
    return Estimate.of(frechet(real, fake), np.array(replicates))


def frechet(real: NDArray[Any], fake: NDArray[Any]) -> float:
    """Squared Frechet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017), in float64.

    |mu - mu'|^2 + tr(S) + tr(S') - 2 tr (S S')^1/2.
    """
    real, fake = _checked(real, fake, 2)
    root, root_fake = _covariance_root(real), _covariance_root(fake)
    # tr (S S')^1/2 is the sum of the singular values of S^1/2 S'^1/2, which loses no digits where S is singular.
    cross = np.linalg.svd(root @ root_fake, compute_uv=False).sum()
    shift = real.mean(0) - fake.mean(0)
    # tr S is the sum of the squares of all entries of its symmetric root.
    return float(shift @ shift + (root**2).sum() + (root_fake**2).sum() - 2 * cross)


def _covariance_root(x: Floats) -> Floats:
    """The symmetric square root of the covariance of x [n, d]."""
    # np.cov of one column is a single number. Rounding may make an eigenvalue of 0 negative, which has no root.
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kernel_distance(real: NDArray[Any], fake: NDArray[Any], *, seed: int) -> Estimate:
    """The unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, section 3); may be negative.

    Resamples hold images twice. Pairs of an image with itself are left out, so that they are unbiased, too.
    """
    real, fake = _checked(real, fake, 2)
    weights, weights_fake = _weights(seed, Resampled.REAL, len(real)), _weights(seed, Resampled.FAKE, len(fake))
    within = _mean_kernel(real, real, weights, weights, same=True) + _mean_kernel(
        fake, fake, weights_fake, weights_fake, same=True
    )
    distances = within - 2 * _mean_kernel(real, fake, weights, weights_fake, same=False)
    return Estimate.of(float(distances[0]), distances[1:])


def _weights(seed: int, which: Resampled, n: int) -> Floats:
    """Counts how often each image occurs in the whole set and in each resample, [n, 1 + REPLICATES]."""
    counts = [np.bincount(resample(seed, i, which, n), minlength=n) for i in range(REPLICATES)]
    return np.stack([np.ones(n), *counts], axis=1).astype(np.float64)


def _mean_kernel(x: Floats, y: Floats, w: Floats, v: Floats, *, same: bool) -> Floats:
    """The mean of the kernel over pairs, weighted by w [n, R] and v [m, R], without pairs of an image with itself."""
    total, pairs = np.zeros(w.shape[1]), w.sum(0) * v.sum(0)
    for start in range(0, len(x), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        kernel = (x[chunk] @ y.T / x.shape[1] + 1) ** 3
        if same:
            np.fill_diagonal(kernel[:, start:], 0)  # the pairs of an image with itself
        total += (w[chunk] * (kernel @ v)).sum(0)
    return total / (pairs - (w * v).sum(0) if same else pairs)


def overlap(real: NDArray[Any], fake: NDArray[Any], *, seed: int, k: int = 5) -> dict[str, Estimate]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) with k nearest neighbours.

    Each image has a ball that reaches to its k-th neighbour in its own set. The intervals resample the images that are
    counted (fakes for precision and density, reals for recall and coverage) and keep the other set's balls.
    """
    real, fake = _checked(real, fake, k + 1)
    radius, radius_fake = _kth_neighbour(real, k), _kth_neighbour(fake, k)
    balls = np.zeros(len(fake))  # of reals, around each fake
    reached, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for chunk, distance in _distances(real, fake):
        inside = distance <= radius[chunk, None]
        balls += inside.sum(0)
        covered[chunk] = inside.any(1)
        reached[chunk] = (distance <= radius_fake).any(1)
    return {
        "precision": mean(balls > 0, seed=seed, which=Resampled.FAKE),
        "recall": mean(reached, seed=seed, which=Resampled.REAL),
        "density": mean(balls / k, seed=seed, which=Resampled.FAKE),
        "coverage": mean(covered, seed=seed, which=Resampled.REAL),
    }


def _kth_neighbour(x: Floats, k: int) -> Floats:
    """Returns the distance of each of x [n, d] to its k-th nearest neighbour among the others, [n]."""
    # k and not k - 1, because the first place is that of the image itself, at distance 0.
    return np.concatenate([np.partition(distance, k, axis=1)[:, k] for _, distance in _distances(x, x)])


def _distances(x: Floats, y: Floats) -> Iterator[tuple[slice, Floats]]:
    """Euclidean distances of a chunk of x to all of y, [chunk, m]; exactly 0 between equal rows."""
    for start in range(0, len(x), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        between = torch.cdist(
            torch.from_numpy(x[chunk]), torch.from_numpy(y), compute_mode="donot_use_mm_for_euclid_dist"
        )
        yield chunk, between.numpy()


def _checked(real: NDArray[Any], fake: NDArray[Any], least: int) -> tuple[Floats, Floats]:
    """Returns both in float64; ValueError if they are too few, of different widths, or not finite."""
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"{name} features must be [n, d] with n at least {least}; got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise ValueError(
                f"{name} features must be finite; got {int((~np.isfinite(x)).any(1).sum())} rows that are not"
            )
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features must be equally wide; got {real.shape[1]} and {fake.shape[1]}")
    return real.astype(np.float64), fake.astype(np.float64)
