"""Estimates with bootstrap intervals (Efron 1979), whose resamples are functions of (seed, replicate, which set)."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.process.randomness import Stream, generator

Floats = NDArray[np.float64]
REPLICATES = 200


class Resampled(IntEnum):
    """The two sets of images, which are drawn independently of each other."""

    REAL = 0
    FAKE = 1


@dataclass(frozen=True)
class Estimate:
    """A number, and its value on each resample, [REPLICATES], which shows what it might have been with other images.

    A resample holds some images twice, which makes most distances larger. So the replicates are shifted until their
    mean is the estimate. The interval shows the spread at this n; compare it with a floor at the same n.
    """

    value: float
    replicates: Floats

    @staticmethod
    def of(value: float, replicates: Floats) -> "Estimate":
        """Makes an estimate, and shifts the replicates so that their mean is the value."""
        return Estimate(value, replicates - replicates.mean() + value)

    def interval(self) -> tuple[float, float]:
        """Returns the range of the central 95% of the replicates."""
        low, high = np.quantile(self.replicates, [0.025, 0.975])
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two runs, with the same resample of the real images, and of sample numbers, in both."""
        return Estimate(self.value - other.value, self.replicates - other.replicates)


def resample(seed: int, replicate: int, which: Resampled, n: int) -> NDArray[np.int64]:
    """Draws n indices of 0..n-1 with replacement."""
    return generator(seed, Stream.BOOTSTRAP, replicate, which).integers(0, n, n)


def mean(values: NDArray[Any], *, seed: int, which: Resampled) -> Estimate:
    """Estimates the mean over images of a number that each image has, values [n]."""
    replicates = [float(values[resample(seed, i, which, len(values))].mean()) for i in range(REPLICATES)]
    return Estimate.of(float(values.mean()), np.array(replicates))
