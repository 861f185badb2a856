"""Metrics of digits by the shipped classifier and the training digits: classes, certainty, copies, usefulness.

Images are uint8 [n, 28, 28, 1], labels [n] are digits 0 to 9, probabilities [n, 10]; ValueError where they are not.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffusion.digits.classifier import check_labels, classify
from diffusion.digits.train_classifier import train
from diffusion.images.evaluation import NEAR_PERCENT
from diffusion.images.pixels import Images
from diffusion.statistics import bootstrap
from diffusion.statistics.bootstrap import Estimate, Floats, Resampled

SURE = 0.9
"""The probability above which the classifier is sure of a digit, as it is of 95% of the real ones."""


@dataclass(frozen=True)
class ClassShares:
    """How often each digit occurs, [10], and how likely real digits are to differ as much from the real shares."""

    shares: Floats
    real_shares: Floats
    chi_squared: float
    p_value: float


def class_shares(labels: NDArray[np.integer], real_labels: NDArray[np.integer]) -> ClassShares:
    """Pearson's chi-squared test with the shares among `real_labels`, which are taken as exact: they should be many."""
    check_labels(labels, len(labels))
    _check_real_labels(real_labels, len(real_labels))
    real_shares = np.bincount(real_labels, minlength=10) / len(real_labels)
    # With less than 5 expected in a class, the statistic does not follow the chi-squared distribution.
    if (expected := len(labels) * real_shares).min() < 5:
        least = int(np.ceil(5 / real_shares.min()))
        raise ValueError(f"class shares need at least {least} images for a chi-squared test; got {len(labels)}")
    counts = np.bincount(labels, minlength=10)
    test = stats.chisquare(counts, expected)
    return ClassShares(counts / len(labels), real_shares, float(test.statistic), float(test.pvalue))


def sure_share(probabilities: NDArray[Any], *, seed: int) -> Estimate:
    """The share of samples whose class has a probability above SURE."""
    return bootstrap.mean(probabilities.max(1) > SURE, seed=seed, which=Resampled.FAKE)


def near_copies(
    distances: Floats,
    labels: NDArray[np.integer],
    real_distances: Floats,
    real_labels: NDArray[np.integer],
    *,
    seed: int,
) -> Estimate:
    """The share of samples nearer to a training image than NEAR_PERCENT of the held-out digits of their class.

    Distances to the nearest training image, [n] and [m]. Held-out digits themselves have a share of NEAR_PERCENT.
    By class, because a 1 is always near another 1.
    """
    check_labels(labels, len(distances))
    _check_real_labels(real_labels, len(real_distances))
    thresholds = np.array([np.percentile(real_distances[real_labels == digit], NEAR_PERCENT) for digit in range(10)])
    return bootstrap.mean(distances < thresholds[labels], seed=seed, which=Resampled.FAKE)


def usefulness(
    images: Images,
    labels: NDArray[np.integer],
    test_images: Images,
    test_labels: NDArray[np.integer],
    *,
    seed: int,
    steps: int = 400,
) -> Estimate:
    """The accuracy on real test digits of the shipped architecture trained on `images` alone (Ravuri & Vinyals 2019).

    Compare it only with the accuracy after training on equally many real images. The interval resamples the test
    digits, not the training.
    """
    check_labels(test_labels, len(test_images), "test labels")
    net = train(images, labels, steps=steps, seed=seed)
    _, probabilities = classify(net, test_images)
    return bootstrap.mean(probabilities.argmax(1) == test_labels, seed=seed, which=Resampled.REAL)


def _check_real_labels(labels: NDArray[np.integer], n: int) -> None:
    check_labels(labels, n, "real labels")
    if lacking := set(range(10)) - set(labels.tolist()):
        raise ValueError(f"each digit must occur among the real ones; got none of {sorted(lacking)}")
