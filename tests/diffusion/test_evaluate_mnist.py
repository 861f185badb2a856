"""The MNIST evaluation: real digits lie at their floors, known corruptions move the numbers the right way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion.data.idx import Split
from diffusion.data.mnist import MNIST
from diffusion.digits.evaluation import DigitEvaluator
from diffusion.images.evaluation import CHUNK, HELD_OUT, RealImages
from diffusion.images.pixels import Images
from diffusion.problems.mnist import MnistProblem
from diffusion.settings import SamplerSettings
from diffusion.statistics.bootstrap import REPLICATES, Estimate
from diffusion.statistics.evaluator import Drawn, Metric, Result, Unit, pack

N = 300


@pytest.fixture(scope="module")
def load(mnist_root: Path) -> Callable[[str], RealImages]:
    def read(split: Split) -> RealImages:
        images = MNIST.read_images(mnist_root, split)
        return RealImages(images, MNIST.read_labels(mnist_root, split))

    return read  # type: ignore[return-value]


def only(real: RealImages, digit: int) -> Images:
    return real.images[real.labels == digit]


def evaluator_of(load: Any, images: Images, asked: NDArray[np.int64] | None = None) -> DigitEvaluator:
    return DigitEvaluator(load, Drawn(images, None, SamplerSettings(sampler="ddpm", steps=50), asked), "digits")


def judge(evaluator: DigitEvaluator) -> dict[str, Metric]:
    """The metrics; what takes long or does not matter here is made up: real distances of 1 to 2, accuracies of 0.9."""
    return evaluator.metrics(computed(evaluator))


def computed(evaluator: DigitEvaluator) -> dict[str, Result]:
    slow = pack(Estimate(0.9, np.full(REPLICATES, 0.9)))
    results: dict[str, Result] = {}
    for name, unit in evaluator.units().items():
        if name.startswith("usefulness"):
            results[name] = {"accuracy": slow}
        elif name.startswith("nearest-real"):
            results[name] = {"distances": np.linspace(1, 2, CHUNK)[:, None]}
        elif name.startswith("features-real"):
            results[name] = of_real_digits(name, unit)
        else:
            results[name] = unit.compute()
    return results


_OF_REAL_DIGITS: dict[str, Result] = {}


def of_real_digits(name: str, unit: Unit) -> Result:
    """Rests on no samples, and on all real digits: computed once for each size, which the name says."""
    assert unit.of == "weights"
    if name not in _OF_REAL_DIGITS:
        _OF_REAL_DIGITS[name] = unit.compute()
    return _OF_REAL_DIGITS[name]


@pytest.fixture(scope="module")
def real(load: Callable[[str], RealImages]) -> Images:
    """Another draw than the evaluation makes."""
    return load("test").part(7, 0, N).images


@pytest.fixture(scope="module")
def found(load: Callable[[str], RealImages], real: Images) -> dict[str, Metric]:
    """How real digits are judged."""
    evaluator = evaluator_of(load, real)
    metrics = judge(evaluator)
    assert evaluator.glance()["frechet"].as_json() == metrics["frechet"].as_json()
    return metrics


def test_real_digits_lie_at_the_floors_and_corrupted_ones_do_not(
    load: Callable[[str], RealImages], real: Images, found: dict[str, Metric]
) -> None:
    noise = np.random.default_rng(0).normal(0, 60, real.shape)
    noisy = judge(evaluator_of(load, (real + noise).clip(0, 255).astype(np.uint8)))
    for name, metric in found.items():
        assert isinstance(metric.floor, Estimate), name
        low, high = metric.floor.interval()
        if name in ("frechet", "kernel", "recall", "coverage"):
            # The interval of the floor knows neither its own draw nor ours.
            assert low - (high - low) <= metric.value <= high + (high - low), name
    for name in ("frechet", "kernel"):
        assert noisy[name].value > 2 * found[name].value, name
    for name in ("recall", "coverage", "sure"):
        assert noisy[name].value < found[name].value, name


def test_copies_and_a_missing_class_are_found(load: Callable[[str], RealImages]) -> None:
    train = load("train")
    copies = train.images[train.labels != 3][:N]
    found = judge(evaluator_of(load, copies))
    assert found["copies"].value == 1
    assert isinstance(found["classes"].floor, Estimate)
    assert found["classes"].value > found["classes"].floor.interval()[1]
    # A whole class lacks: the statistic of n (0 - p)^2 / p alone is n p.
    assert found["classes"].value > 0.9 * N * (train.labels == 3).mean()


def test_the_units_are_the_same_for_all_sets_of_a_size(load: Callable[[str], RealImages]) -> None:
    images = load("test").images
    units = [evaluator_of(load, images[i : i + N]).units() for i in (0, 1000)]
    assert list(units[0]) == list(units[1])
    assert len(units[0]) == 5 + -(-N // CHUNK) + HELD_OUT // CHUNK


def test_constant_images_get_finite_numbers_and_no_praise(load: Callable[[str], RealImages]) -> None:
    found = judge(evaluator_of(load, np.zeros((N, 28, 28, 1), np.uint8)))
    assert all(
        np.isfinite([metric.value, *metric.estimate.replicates]).all()
        for metric in found.values()
        if isinstance(metric.estimate, Estimate)
    )
    for name in ("precision", "recall", "density", "coverage", "sure"):
        assert found[name].value == 0, name
    assert found["classes"].value > 1000


def test_a_new_metric_comes_with_a_new_version(found: dict[str, Metric]) -> None:
    """Without one, what an older version has evaluated would count as complete, and never get the new metric."""
    in_features = ["frechet", "kernel", "precision", "recall", "density", "coverage", "sure"]
    known = {2: [*in_features, "classes", "copies", "usefulness"]}
    assert list(found) == known[MnistProblem.metrics_version]


def test_digits_on_demand_are_judged_by_the_digit_asked_for(load: Callable[[str], RealImages]) -> None:
    real = load("test").part(7, 0, N)
    evaluator = evaluator_of(load, real.images, real.labels.astype(np.int64))
    results = computed(evaluator)
    found, rows = evaluator.metrics(results), evaluator.tables(results)["by_class"].rows
    assert "classes" not in found  # how often each comes was asked for
    assert list(found)[:2] == ["asked", "frechet"]
    assert found["asked"].value == pytest.approx(0.99, abs=0.01)
    assert [(row["digit"], row["samples"]) for row in rows] == list(enumerate(np.bincount(real.labels).tolist()))
    assert all(row["right"] > 0.9 and row["frechet"] < 2 * row["floor"] for row in rows)  # type: ignore[operator]

    # As many are compared where test digits are few, and floors are of the digits asked for.
    def with_few(split: Split) -> RealImages:
        every = load(split)
        sevens = only(every, 7)
        return every if split == "train" else RealImages(sevens[:100], np.full(100, 7, np.uint8))

    evaluator = evaluator_of(with_few, only(load("test"), 7), np.full(1028, 7))
    assert set(evaluator._held_out.labels) == set(evaluator._real.labels) == {7}
    (row,) = evaluator.tables({"by-class": evaluator.units()["by-class"].compute()})["by_class"].rows
    assert 0.5 < row["frechet"] / row["floor"] < 2  # type: ignore[operator]

    # Of the 3s and 7s a half was asked for as the other digit; other digits are not there.
    few = only(load("test"), 3)[:100], only(load("test"), 7)[:100]
    asked = np.repeat([3, 7, 3, 7], 50)
    evaluator = evaluator_of(load, np.concatenate(few), asked)
    results = computed(evaluator)
    found, rows = evaluator.metrics(results), evaluator.tables(results)["by_class"].rows
    assert list(found) == ["asked", "copies"]
    assert found["asked"].value == pytest.approx(0.5, abs=0.02)
    assert all(row["frechet"] > 3 * row["floor"] for row in rows)  # type: ignore[operator]
