"""The evaluation of digits, in the features of the shipped digit classifier too."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from diffusion.digits import classifier
from diffusion.digits.metrics import SURE, class_shares, near_copies, sure_share, usefulness
from diffusion.images.evaluation import ImageEvaluator, RealImages
from diffusion.images.pixels import Images
from diffusion.statistics.bootstrap import Estimate
from diffusion.statistics.evaluator import Metric, Result, Table, Unit, pack, unpack
from diffusion.statistics.features import frechet_distance, kernel_distance, overlap


class DigitEvaluator(ImageEvaluator):
    """Judges samples [n, 28, 28, 1], and the model that drew them; without it the samples alone."""

    def units(self) -> dict[str, Unit]:
        n = self._n
        return {
            "usefulness": Unit("samples", self._usefulness),
            f"usefulness-real-{n}": Unit("weights", lambda: self._usefulness_of(self._real)),
            "features": Unit("samples", partial(self._distances, self._samples)),
            f"features-real-{n}": Unit("weights", lambda: self._distances(self._held_out.images)),
            "classes": Unit("samples", self._classes),
            **super().units(),
        }

    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        general = super().metrics(results)
        own, real = results["features"], results[f"features-real-{self._n}"]

        def beside(name: str, label: str, better: Any = "higher") -> Metric:
            return Metric(label, unpack(own[name]), unpack(real[name]), better)

        return {
            "frechet": beside("frechet", "Frechet distance", "lower"),
            "kernel": beside("kernel", "kernel distance", "lower"),
            **{name: beside(name, name) for name in ("precision", "recall", "density", "coverage")},
            "sure": beside("sure", f"share of sure digits (p > {SURE:g})"),
            "classes": self._class_metric(results),
            "copies": general["copies"],
            "usefulness": Metric(
                "accuracy of a net trained on it",
                unpack(results["usefulness"]["accuracy"]),
                unpack(results[f"usefulness-real-{self._n}"]["accuracy"]),
                "higher",
            ),
            **general,
        }

    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
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
        shares = class_shares(labels, self._train.labels)
        distances, indices = (self._gathered(results, "nearest", name) for name in ("distances", "indices"))
        super().draw(results, folder)
        figures.classes(shares.shares, shares.real_shares, self._n, folder / "classes.png")
        figures.neighbours(self._samples, labels, self._train.images, distances, indices, folder / "nearest.png")

    def _distances(self, images: Images) -> Result:
        """Metrics of images as samples against training digits, in the classifier's features."""
        net = classifier.load()
        real, _ = classifier.classify(net, self._real.images)
        features, probabilities = classifier.classify(net, images)
        found = {
            "frechet": frechet_distance(real, features, seed=self._seed),
            "kernel": kernel_distance(real, features, seed=self._seed),
            **overlap(real, features, seed=self._seed),
            "sure": sure_share(probabilities, seed=self._seed),
        }
        return {name: pack(estimate) for name, estimate in found.items()}

    def _classes(self) -> Result:
        """The digit that the classifier takes each sample for."""
        _, probabilities = classifier.classify(classifier.load(), self._samples)
        return {"labels": probabilities.argmax(1)}

    def _usefulness(self) -> Result:
        return self._usefulness_of(RealImages(self._samples, self._classes()["labels"].astype(np.uint8)))

    def _usefulness_of(self, training: RealImages) -> Result:
        test = self._test
        accuracy = usefulness(training.images, training.labels, test.images, test.labels, seed=self._seed)
        return {"accuracy": pack(accuracy)}

    def _class_metric(self, results: Mapping[str, Result]) -> Metric:
        shares = class_shares(results["classes"]["labels"], self._train.labels)
        chance = stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, 9)  # of samples with the real shares
        return Metric("chi-squared of the class shares", shares.chi_squared, Estimate(9.0, chance))

    def _copies(self, results: Mapping[str, Result]) -> Metric:
        distances = self._gathered(results, "nearest", "distances")[:, 0]
        real = self._gathered(results, "nearest-real", "distances")[:, 0]
        labels = self._judges.labels
        estimate = near_copies(distances, results["classes"]["labels"], real, labels, seed=self._seed)
        floor = near_copies(real, labels, real, labels, seed=self._seed)
        return Metric("share of near copies", estimate, floor, bounds=(0, 1))
