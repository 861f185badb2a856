"""Digit metrics against scipy and brute force, and against what must happen to spoilt digits."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats
from scipy.spatial.distance import cdist

from diffusion.data.idx import Split
from diffusion.data.mnist import CLASSIFIER, MNIST
from diffusion.digits import classifier, metrics
from diffusion.digits.classifier import DigitNet, classify
from diffusion.digits.train_classifier import train
from diffusion.images.nearest import nearest
from diffusion.process.randomness import Stream, permutation
from diffusion.statistics.features import frechet, kernel_distance, overlap

N = 600
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def net() -> DigitNet:
    return classifier.load()


def drawn(root: Path, split: Split, n: int) -> tuple[Images, NDArray[np.uint8]]:
    """n digits and their labels, by chance: the files are ordered by writer."""
    images, labels = MNIST.read_images(root, split), MNIST.read_labels(root, split)
    chosen = permutation(0, Stream.FIGURE, 0, len(images))[:n]
    return images[chosen], labels[chosen]


@pytest.fixture(scope="module")
def training(mnist_root: Path) -> tuple[Images, NDArray[np.uint8]]:
    return drawn(mnist_root, "train", 6000)


@pytest.fixture(scope="module")
def held_out(mnist_root: Path) -> tuple[Images, NDArray[np.uint8]]:
    return drawn(mnist_root, "test", 4000)


@pytest.fixture(scope="module")
def real_features(net: DigitNet, training: tuple[Images, Any]) -> NDArray[np.float32]:
    return classify(net, training[0][:N])[0]


def distances(net: DigitNet, real: NDArray[np.float32], images: Images) -> dict[str, float]:
    """All feature metrics of `images`."""
    fake, _ = classify(net, images)
    parts = {"kernel": kernel_distance(real, fake, seed=0), **overlap(real, fake, seed=0)}
    return {"frechet": frechet(real, fake), **{name: estimate.value for name, estimate in parts.items()}}


@pytest.fixture(scope="module")
def floor(net: DigitNet, real_features: NDArray[np.float32], held_out: tuple[Images, Any]) -> dict[str, float]:
    return distances(net, real_features, held_out[0][:N])


def test_the_shipped_classifier_is_right_about_real_digits(net: DigitNet, mnist_root: Path) -> None:
    images, labels = drawn(mnist_root, "test", 10_000)
    features, probabilities = classify(net, images)
    assert (probabilities.argmax(1) == labels).mean() >= 0.993
    assert features.shape == (10_000, classifier.FEATURES)
    assert 0.1 < features.var(0).min() < features.var(0).max() < 2
    assert CLASSIFIER.stat().st_size < 600_000


def test_an_image_has_the_same_features_in_any_company(net: DigitNet, held_out: tuple[Images, Any]) -> None:
    together, _ = classify(net, held_out[0][:700])
    apart = np.concatenate([classify(net, held_out[0][a:b])[0] for a, b in ((0, 3), (3, 500), (500, 700))])
    assert apart.tobytes() == together.tobytes()


def test_real_digits_are_as_far_from_real_ones_as_equal_distributions(
    net: DigitNet, real_features: NDArray[np.float32], held_out: tuple[Images, Any], training: tuple[Images, Any]
) -> None:
    for images in (held_out[0][:N], training[0][N : 2 * N]):
        fake, _ = classify(net, images)
        low, high = kernel_distance(real_features, fake, seed=0).interval()
        assert low < 0 < high
        found = overlap(real_features, fake, seed=0)
        known = 1 - math.prod((N - 1 - i) / (2 * N - 1 - i) for i in range(5))
        assert found["coverage"].value == pytest.approx(known, abs=0.03)
        assert found["density"].value == pytest.approx(1, abs=0.12)


def blurred(images: Images) -> Images:
    return ndimage.gaussian_filter(images, (0, 1.5, 1.5, 0))


def noisy(images: Images) -> Images:
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def collapsed(images: Images) -> Images:
    return np.repeat(images[:10], N // 10, axis=0)


def test_blur_shows_in_every_feature_metric(
    net: DigitNet, real_features: Any, held_out: tuple[Images, Any], floor: dict[str, float]
) -> None:
    spoilt = distances(net, real_features, blurred(held_out[0][:N]))
    assert spoilt["frechet"] > 3 * floor["frechet"]
    assert spoilt["kernel"] > 3 * abs(floor["kernel"])
    assert all(spoilt[name] < floor[name] - 0.05 for name in ("precision", "density", "coverage"))


def test_collapse_shows_in_diversity_and_not_in_precision(
    net: DigitNet, real_features: Any, held_out: tuple[Images, Any], floor: dict[str, float]
) -> None:
    spoilt = distances(net, real_features, collapsed(held_out[0]))
    assert spoilt["frechet"] > 3 * floor["frechet"]
    assert spoilt["recall"] < 0.1 < floor["recall"]
    assert spoilt["coverage"] < 0.2 < floor["coverage"]
    assert spoilt["precision"] > floor["precision"] - 0.2


def test_a_missing_class_shows_in_the_distances_and_the_shares(
    net: DigitNet,
    real_features: Any,
    training: tuple[Images, Any],
    held_out: tuple[Images, Any],
    floor: dict[str, float],
) -> None:
    images, labels = held_out[0][held_out[1] != 4][:N], held_out[1][held_out[1] != 4][:N]
    spoilt = distances(net, real_features, images)
    assert spoilt["frechet"] > 1.3 * floor["frechet"]
    assert spoilt["coverage"] < floor["coverage"] - 0.03
    shares = metrics.class_shares(labels, training[1])
    assert shares.shares[4] == 0
    assert shares.p_value < 1e-6


def test_more_spoilt_is_further_away(net: DigitNet, real_features: Any, held_out: tuple[Images, Any]) -> None:
    clean, bad = held_out[0][:N], noisy(blurred(held_out[0][:N]))
    mixtures = [np.concatenate([bad[:n], clean[n:]]) for n in (0, 100, 600)]
    measured = [distances(net, real_features, images) for images in mixtures]
    for name, direction in (("frechet", 1), ("kernel", 1), ("density", -1), ("coverage", -1)):
        assert (np.diff([direction * each[name] for each in measured]) > 0).all(), name


def test_the_chi_squared_test_equals_scipys_and_accepts_real_digits(training: Any, held_out: Any) -> None:
    shares = metrics.class_shares(held_out[1][:500], training[1])
    counts = np.array([(held_out[1][:500] == digit).sum() for digit in range(10)])
    known = stats.chisquare(counts, 500 * np.array([(training[1] == digit).mean() for digit in range(10)]))
    assert (shares.chi_squared, shares.p_value) == pytest.approx((known.statistic, known.pvalue))
    assert shares.p_value > 1e-3
    assert shares.shares.sum() == pytest.approx(1)


def test_the_classifier_is_sure_of_digits_and_not_of_noise(net: DigitNet, held_out: tuple[Images, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (N, 28, 28, 1), dtype=np.uint8)
    real, spoilt, none = (
        metrics.sure_share(classify(net, images)[1], seed=0).value
        for images in (held_out[0][:N], blurred(held_out[0][:N]), noise)
    )
    assert real > 0.93
    assert spoilt < 0.5
    assert none == 0


def test_the_nearest_neighbours_equal_brute_force(training: tuple[Images, Any], held_out: tuple[Images, Any]) -> None:
    images, others = held_out[0][:300], training[0][:2000]
    distance, index = nearest(images, others, neighbours=3)
    known = cdist(images.reshape(300, -1) / 255, others.reshape(2000, -1) / 255)
    np.testing.assert_allclose(distance, np.sort(known, axis=1)[:, :3], rtol=1e-12)
    np.testing.assert_array_equal(index, known.argsort(axis=1)[:, :3])


def test_copies_are_found_and_held_out_digits_are_not(training: Any, held_out: Any) -> None:
    real_distances, _ = nearest(held_out[0], training[0])
    images, labels = held_out[0][:N].copy(), held_out[1][:N].copy()
    images[:60], labels[:60] = training[0][:60], training[1][:60]
    images[60:90], labels[60:90] = (training[0][60:90].astype(int) + 2).clip(0, 255), training[1][60:90]
    found, index = nearest(images, training[0])
    assert (found[:60] == 0).all()
    assert np.array_equal(index[:90, 0], np.arange(90))
    real_labels = held_out[1]
    copies = metrics.near_copies(found[:, 0], labels, real_distances[:, 0], real_labels, seed=0)
    assert copies.value == pytest.approx(90 / N, abs=0.02)
    none = metrics.near_copies(real_distances[:, 0], real_labels, real_distances[:, 0], real_labels, seed=0)
    assert none.value == pytest.approx(0.01, abs=0.003)


def test_a_net_learns_from_good_digits_and_not_from_few_ones(training: Any, held_out: Any) -> None:
    images, labels, test = training[0][:1000], training[1][:1000], (held_out[0][:500], held_out[1][:500])
    good = metrics.usefulness(images, labels, *test, seed=0, steps=30).value
    few = metrics.usefulness(images[:10], labels[:10], *test, seed=0, steps=30).value
    assert good > 0.7
    assert few < good - 0.2


def test_training_repeats_exactly_and_leaves_torchs_generator_alone(training: Any) -> None:
    state = torch.get_rng_state()
    first, second, other = (train(training[0][:200], training[1][:200], steps=3, seed=seed) for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.last.weight, other.last.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((5, 28, 28, 1)),
        np.zeros((5, 28, 28), np.uint8),
        np.zeros((5, 1, 28, 28), np.uint8),
        np.zeros(5, np.uint8),
    ],
)
def test_what_is_no_digit_is_refused(images: Any, net: DigitNet) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[n, 28, 28, 1\] with n at least 1; got"):
        classify(net, images)
    with pytest.raises(ValueError, match=r"^training images must be uint8"):
        nearest(np.zeros((1, 28, 28, 1), np.uint8), images)


def test_constant_images_have_their_exact_distance(net: DigitNet, real_features: NDArray[np.float32]) -> None:
    fake, probabilities = classify(net, np.zeros((N, 28, 28, 1), np.uint8))
    assert (fake == fake[0]).all()
    real = real_features.astype(np.float64)
    known = ((real.mean(0) - fake[0]) ** 2).sum() + real.var(0, ddof=1).sum()
    assert frechet(real_features, fake) == pytest.approx(known, rel=1e-9)
    found = overlap(real_features, fake, seed=0)
    assert max(found[name].value for name in ("precision", "density", "recall", "coverage")) < 0.05
    assert metrics.sure_share(probabilities, seed=0).interval() == (0, 0)


def test_too_few_images_for_a_test_and_wrong_labels_are_refused(training: Any) -> None:
    labels = training[1]
    with pytest.raises(ValueError, match=r"class shares need at least 5\d images for a chi-squared test; got 20"):
        metrics.class_shares(labels[:20], labels)
    with pytest.raises(ValueError, match=r"each digit must occur among the real ones; got none of"):
        metrics.class_shares(labels, labels[labels != 3])
    with pytest.raises(ValueError, match=r"labels must be 100 whole numbers from 0 to 9"):
        metrics.class_shares(labels[:100] + 5, labels)
