"""The evaluation of digits, in the features of the shipped digit classifier too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffusion.digits import classifier
from diffusion.digits.metrics import SURE, class_shares, near_copies, sure_share, usefulness
from diffusion.images.evaluation import ImageEvaluator, RealImages
from diffusion.images.pixels import Images
from diffusion.statistics import bootstrap
from diffusion.statistics.bootstrap import Estimate, Resampled
from diffusion.statistics.evaluator import Better, Metric, Result, Table, Unit, pack, unpack
from diffusion.statistics.features import frechet, frechet_distance, kernel_distance, overlap


@dataclass(frozen=True)
class Seen:
    """Samples, and as many real digits, as the classifier sees them: features [n, 64] and probabilities [n, 10]."""

    real: NDArray[np.float32]
    features: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    seed: int

    @cached_property
    def overlap(self) -> dict[str, Estimate]:
        """Four metrics that share one search for neighbours."""
        return overlap(self.real, self.features, seed=self.seed)


class FeatureMetric(NamedTuple):
    """A metric of what the classifier sees; its floor is the same for test digits instead of samples."""

    label: str
    better: Better
    compute: Callable[[Seen], Estimate]


FEATURE_METRICS = {
    "frechet": FeatureMetric("Frechet distance", "lower", lambda s: frechet_distance(s.real, s.features, seed=s.seed)),
    "kernel": FeatureMetric("kernel distance", "lower", lambda s: kernel_distance(s.real, s.features, seed=s.seed)),
    "precision": FeatureMetric("precision", "higher", lambda seen: seen.overlap["precision"]),
    "recall": FeatureMetric("recall", "higher", lambda seen: seen.overlap["recall"]),
    "density": FeatureMetric("density", "higher", lambda seen: seen.overlap["density"]),
    "coverage": FeatureMetric("coverage", "higher", lambda seen: seen.overlap["coverage"]),
    "sure": FeatureMetric(
        f"share of sure digits (p > {SURE:g})", "higher", lambda seen: sure_share(seen.probabilities, seed=seen.seed)
    ),
}
"""Whoever adds a row gives `MnistProblem` a `metrics_version` of its own, one higher than the one that it inherits from
`ImageProblem`, and tells the test in tests/diffusion/test_evaluate_mnist.py."""


BY_CLASS = ("digit", "samples", "right", "frechet", "floor")
"""Columns of the table by class."""


class DigitEvaluator(ImageEvaluator):
    """Judges samples [n, 28, 28, 1], and the model that drew them; without it the samples alone.

    Samples that were to be of certain digits are judged digit by digit, too; where these are not all ten, nothing
    compares them with all real digits.
    """

    def units(self) -> dict[str, Unit]:
        size, general = self._size, {"classes": Unit("samples", self._classes), **super().units()}
        if self._asked is not None:
            general = {"by-class": Unit("samples", partial(self._by_class, self._asked)), **general}
        if not self._of_all_digits:
            return general
        # Results about real digits rest on no samples: kept with the weights, they serve all sets of this size.
        return {
            "usefulness": Unit("samples", self._usefulness),
            f"usefulness-real-{size}": Unit("weights", lambda: self._usefulness_of(self._real)),
            "features": Unit("samples", partial(self._distances, self._samples)),
            f"features-real-{size}": Unit("weights", lambda: self._distances(self._held_out.images)),
            **general,
        }

    @property
    def _of_all_digits(self) -> bool:
        return self._asked is None or len(np.unique(self._asked)) == 10

    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        general = super().metrics(results)
        if self._asked is not None:
            found = results["by-class"]
            label = "share that is taken for the digit asked for"
            asked = Metric(label, unpack(found["share"]), unpack(found["share_real"]), "higher", (0, 1))
            general = {"asked": asked, **general}
        if not self._of_all_digits:
            return general
        own, real = results["features"], results[f"features-real-{self._size}"]
        return {
            **{name: metric for name, metric in general.items() if name == "asked"},
            **{
                name: Metric(metric.label, unpack(own[name]), unpack(real[name]), metric.better)
                for name, metric in FEATURE_METRICS.items()
            },
            **({"classes": self._class_metric(results)} if self._asked is None else {}),
            "copies": general["copies"],  # in `general`, too; listed here for its place in tables
            "usefulness": Metric(
                "accuracy of a net trained on it",
                unpack(results["usefulness"]["accuracy"]),
                unpack(results[f"usefulness-real-{self._size}"]["accuracy"]),
                "higher",
            ),
            **general,
        }

    def glance(self) -> dict[str, Metric]:
        net, parts = classifier.load(), (self._real.images, self._samples, self._held_out.images)
        real, own, held_out = (classifier.classify(net, images)[0] for images in parts)
        found, floor = (frechet_distance(real, features, seed=self._seed) for features in (own, held_out))
        return {"frechet": Metric(FEATURE_METRICS["frechet"].label, found, floor)}

    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        if self._asked is not None:
            found = {name: results["by-class"][name].tolist() for name in BY_CLASS}
            by_class = [dict(zip(BY_CLASS, row, strict=True)) for row in zip(*found.values(), strict=True)]
            title = "By the digit asked for: share taken for it, Frechet distance, and that of real test digits"
            return {"by_class": Table(title, by_class), **super().tables(results)}
        shares = class_shares(results["classes"]["labels"], self._train.labels)
        rows = [
            {"digit": digit, "samples": float(shares.shares[digit]), "real": float(shares.real_shares[digit])}
            for digit in range(10)
        ]
        title = f"Share of each digit (chi-squared test: p = {shares.p_value:.2g})"
        return {"classes": Table(title, rows), **super().tables(results)}

    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        from diffusion.digits import figures  # here, because plotting libraries take a second to import

        labels = results["classes"]["labels"]
        distances, indices = (self._gathered(results, "nearest", name) for name in ("distances", "indices"))
        super().draw(results, folder)
        if self._asked is None:
            shares = class_shares(labels, self._train.labels)
            figures.classes(shares.shares, shares.real_shares, self._n, folder / "classes.png")
        figures.neighbours(self._samples, labels, self._train.images, distances, indices, folder / "nearest.png")

    def _distances(self, images: Images) -> Result:
        """Metrics of images as samples against training digits, in the classifier's features."""
        net = classifier.load()
        real, _ = classifier.classify(net, self._real.images)
        seen = Seen(real, *classifier.classify(net, images), self._seed)
        return {name: pack(metric.compute(seen)) for name, metric in FEATURE_METRICS.items()}

    def _classes(self) -> Result:
        """The digit that the classifier takes each sample for."""
        _, probabilities = classifier.classify(classifier.load(), self._samples)
        return {"labels": probabilities.argmax(1)}

    def _by_class(self, asked: NDArray[np.int64]) -> Result:
        """How right samples of each digit are, and their Frechet distance to as many training digits; floors beside.

        As many test digits stand beside them, so where a digit has fewer, no more samples of it are compared.
        """
        net = classifier.load()
        features, probabilities = classifier.classify(net, self._samples)
        train, _ = classifier.classify(net, self._real.images)
        test, of_test = classifier.classify(net, self._held_out.images)
        right, held_out = probabilities.argmax(1) == asked, of_test.argmax(1) == self._held_out.labels
        rows = []
        for digit, n in zip(*np.unique(asked, return_counts=True), strict=True):
            own_test = test[self._held_out.labels == digit]
            own, own_train = features[asked == digit], train[self._real.labels == digit]
            own, own_train = own[: len(own_test)], own_train[: len(own_test)]
            rows.append((digit, n, right[asked == digit].mean(), frechet(own_train, own), frechet(own_train, own_test)))
        return {
            "share": pack(bootstrap.mean(right, seed=self._seed, which=Resampled.FAKE)),
            "share_real": pack(bootstrap.mean(held_out, seed=self._seed, which=Resampled.REAL)),
            **dict(zip(BY_CLASS, map(np.array, zip(*rows, strict=True)), strict=True)),
        }

    def _usefulness(self) -> Result:
        labels = self._classes()["labels"] if self._asked is None else self._asked
        return self._usefulness_of(RealImages(self._samples, labels.astype(np.uint8)))

    def _usefulness_of(self, training: RealImages) -> Result:
        test = self._test
        accuracy = usefulness(training.images, training.labels, test.images, test.labels, seed=self._seed)
        return {"accuracy": pack(accuracy)}

    def _class_metric(self, results: Mapping[str, Result]) -> Metric:
        shares = class_shares(results["classes"]["labels"], self._train.labels)
        # Ten shares that sum to 1 leave 9 degrees of freedom, and the mean of that distribution is 9.
        chance = stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, 9)  # of samples with the real shares
        return Metric("chi-squared of the class shares", shares.chi_squared, Estimate(9.0, chance))

    def _copies(self, results: Mapping[str, Result]) -> Metric:
        distances = self._gathered(results, "nearest", "distances")[:, 0]
        real = self._gathered(results, "nearest-real", "distances")[:, 0]
        labels = self._judges.labels
        estimate = near_copies(distances, results["classes"]["labels"], real, labels, seed=self._seed)
        floor = near_copies(real, labels, real, labels, seed=self._seed)
        return Metric("share of near copies", estimate, floor, bounds=(0, 1))
