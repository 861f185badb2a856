"""Estimates with bootstrap intervals (Efron 1979), whose resamples are functions of (seed, replicate, which set)."""

from collections.abc import Callable
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
    """A number and what it might have been with other images: its value on each resample, [REPLICATES].

    Resamples hold some images twice, which biases most distances upwards. The replicates are moved so that their mean
    is the estimate: the interval shows the spread of the estimate at this n, to be compared with a floor at the same n.
    """

    value: float
    replicates: Floats

    @staticmethod
    def of(value: float, replicates: Floats) -> "Estimate":
        """Moves the replicates."""
        return Estimate(value, replicates - replicates.mean() + value)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The central part of the replicates."""
        low, high = np.quantile(self.replicates, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two runs, with the same resample of the real images, and of sample numbers, in both."""
        return Estimate(self.value - other.value, self.replicates - other.replicates)


def resample(seed: int, replicate: int, which: Resampled, n: int) -> NDArray[np.int64]:
    """n indices of 0..n-1 with replacement."""
    return generator(seed, Stream.BOOTSTRAP, replicate, which).integers(0, n, n)


def mean(values: NDArray[Any], *, seed: int, which: Resampled) -> Estimate:
    """The mean over images of a number that each image has for itself, values [n]."""
    return statistic(lambda chosen: float(values[chosen].mean()), len(values), seed=seed, which=which)


def statistic(value_of: Callable[[NDArray[np.int64]], float], n: int, *, seed: int, which: Resampled) -> Estimate:
    """Any number that depends on which of n images there are, given their indices."""
    replicates = [value_of(resample(seed, replicate, which, n)) for replicate in range(REPLICATES)]
    return Estimate.of(value_of(np.arange(n)), np.array(replicates))
