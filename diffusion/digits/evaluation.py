"""The evaluation of the MNIST experiments, in the features of the shipped digit classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffusion.digits import classifier
from diffusion.digits.metrics import SURE, class_shares, near_copies, nearest, sure_share, usefulness
from diffusion.images.pixels import Images
from diffusion.process.model import DiffusionModel
from diffusion.process.randomness import Stream, permutation
from diffusion.statistics import bits_per_dim, bits_table, bootstrap
from diffusion.statistics.bits_per_dim import Bound
from diffusion.statistics.bootstrap import Estimate, Resampled
from diffusion.statistics.evaluator import Evaluator, Metric, Result, Table, Unit, pack, unpack
from diffusion.statistics.features import frechet, frechet_distance, kernel_distance, overlap

LARGEST = 10_000
"""Samples that are used, and real ones beside them: as many as there are test digits, for the floors."""
CHUNK = 500
"""Images whose nearest training images are looked for in one unit."""
HELD_OUT = 4_000
"""Test digits whose nearest training images say what is near."""
BOUND_IMAGES, BOUND_CHUNK, STRATA = 512, 32, 63
"""Test digits whose bits per dimension are taken, how many in a unit, and timesteps for each beside t = 0."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class Digits:
    """Real digits: images [n, 28, 28, 1] and labels [n]."""

    images: Images
    labels: NDArray[np.uint8]

    def part(self, seed: int, which: int, n: int) -> "Digits":
        """n of them, drawn without replacement; the first ones of the test digits are easier than the last."""
        chosen = permutation(seed, Stream.EVALUATION, which, len(self.images))[:n]
        return Digits(self.images[chosen], self.labels[chosen])


class EvaluatorMnist(Evaluator):
    """Samples [n, 28, 28, 1], and the model that drew them; without it what the samples alone tell."""

    def __init__(
        self,
        load: Callable[[Literal["train", "test"]], Digits],
        samples: Images,
        model: DiffusionModel | None,
        seed: int,
        inception: bool,
    ) -> None:
        self._load, self._samples, self._model, self._seed = load, samples[:LARGEST], model, seed
        self._inception = inception
        self._n = len(self._samples)

    @cached_property
    def _train(self) -> Digits:
        return self._load("train")

    @cached_property
    def _test(self) -> Digits:
        return self._load("test")

    @cached_property
    def _real(self) -> Digits:
        """Training digits, as many as samples."""
        return self._train.part(self._seed, 0, self._n)

    @cached_property
    def _held_out(self) -> Digits:
        """Test digits, as many as samples."""
        return self._test.part(self._seed, 1, self._n)

    def units(self) -> dict[str, Unit]:
        n = self._n
        units = {
            "usefulness": Unit("samples", self._usefulness),
            f"usefulness-real-{n}": Unit("weights", lambda: self._usefulness_of(self._real)),
            "features": Unit("samples", partial(self._distances, self._samples)),
            f"features-real-{n}": Unit("weights", lambda: self._distances(self._held_out.images)),
            "classes": Unit("samples", self._classes),
        }
        for first in range(0, n, CHUNK):
            units[f"nearest-{first}"] = Unit("samples", partial(self._nearest, first))
        for first in range(0, HELD_OUT, CHUNK):
            units[f"nearest-real-{first}"] = Unit("weights", partial(self._nearest_real, first))
        for first in range(0, n if self._inception else 0, CHUNK):
            units[f"inception-{first}"] = Unit("samples", partial(self._inception_features, "samples", first))
            for of in ("train", "test"):
                unit = Unit("weights", partial(self._inception_features, of, first))
                units[f"inception-{of}-{n}-{first}"] = unit
        if self._model is not None:
            for first in range(0, BOUND_IMAGES, BOUND_CHUNK):
                units[f"bound-{first}"] = Unit("weights", partial(self._bound, self._model, first))
        return units

    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        own, real = results["features"], results[f"features-real-{self._n}"]

        def beside(name: str, label: str, better: Any = "higher") -> Metric:
            return Metric(label, unpack(own[name]), unpack(real[name]), better)

        found = {
            "frechet": beside("frechet", "Frechet distance", "lower"),
            "kernel": beside("kernel", "kernel distance", "lower"),
            **{name: beside(name, name) for name in ("precision", "recall", "density", "coverage")},
            "sure": beside("sure", f"share of sure digits (p > {SURE:g})"),
            "classes": self._class_metric(results),
            "copies": self._copies(results),
            "usefulness": Metric(
                "accuracy of a net trained on it",
                unpack(results["usefulness"]["accuracy"]),
                unpack(results[f"usefulness-real-{self._n}"]["accuracy"]),
                "higher",
            ),
        }
        if self._inception:
            found["inception_fid"] = self._inception_distance(results)
        if self._model is None:
            return found
        bound = self._whole_bound(results)
        return {
            **found,
            "held_out_loss": Metric("loss of test digits", self._mean(bits_table.mean_loss(bound)), None),
            "bits_per_dim": Metric("bits per dimension of test digits", self._mean(bound.total), None),
        }

    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        shares = class_shares(results["classes"]["labels"], self._train.labels)
        rows = [
            {"digit": digit, "samples": float(shares.shares[digit]), "real": float(shares.real_shares[digit])}
            for digit in range(10)
        ]
        found = {"classes": Table(f"Share of each digit (chi-squared test: p = {shares.p_value:.2g})", rows)}
        if self._model is not None:
            title = f"Bits per dimension and loss of {BOUND_IMAGES} test digits, by timestep"
            found["bound"] = Table(title, bits_table.rows(self._whole_bound(results)))
        return found

    def curves(self, results: Mapping[str, Result]) -> dict[str, Any]:
        return {} if self._model is None else {"bound_by_t": bits_table.curves(self._whole_bound(results))}

    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        from diffusion.digits import figures  # here, because plotting libraries take a second to import

        labels = results["classes"]["labels"]
        shares = class_shares(labels, self._train.labels)
        distances, indices = (self._gathered(results, "nearest", name) for name in ("distances", "indices"))
        figures.real_beside_generated(self._held_out.images, self._samples, folder / "real-beside-generated.png")
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
        return self._usefulness_of(Digits(self._samples, self._classes()["labels"].astype(np.uint8)))

    def _usefulness_of(self, training: Digits) -> Result:
        test = self._test
        accuracy = usefulness(training.images, training.labels, test.images, test.labels, seed=self._seed)
        return {"accuracy": pack(accuracy)}

    def _nearest(self, first: int) -> Result:
        distances, indices = nearest(self._samples[first : first + CHUNK], self._train.images, NEIGHBOURS)
        return {"distances": distances, "indices": indices}

    def _nearest_real(self, first: int) -> Result:
        part = self._test.part(self._seed, 1, HELD_OUT)
        distances, _ = nearest(part.images[first : first + CHUNK], self._train.images)
        return {"distances": distances}

    def _bound(self, model: DiffusionModel, first: int) -> Result:
        images = self._test.part(self._seed, 1, BOUND_IMAGES).images[first : first + BOUND_CHUNK]
        abar = model.alphas_cumprod.double().cpu()
        edges = bits_per_dim.strata(len(abar), min(STRATA, len(abar) - 1))
        found = bits_per_dim.bound(
            model.predict_for,
            images,
            abar,
            first=first,
            seed=self._seed,
            edges=edges,
            clip=(-1, 1),
        )
        return vars(found)

    def _inception_features(self, of: str, first: int) -> Result:
        from diffusion.images.inception import inception_features  # here, because few ask for it

        images = self._samples if of == "samples" else (self._real if of == "train" else self._held_out).images
        return {"features": inception_features(images[first : first + CHUNK]).astype(np.float32)}

    def _inception_distance(self, results: Mapping[str, Result]) -> Metric:
        train, test = (self._gathered(results, f"inception-{of}-{self._n}", "features") for of in ("train", "test"))
        own = self._gathered(results, "inception", "features")
        return Metric("Inception FID", frechet(train, own), frechet(train, test))

    def _class_metric(self, results: Mapping[str, Result]) -> Metric:
        shares = class_shares(results["classes"]["labels"], self._train.labels)
        chance = stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, 9)  # of samples with the real shares
        return Metric("chi-squared of the class shares", shares.chi_squared, Estimate(9.0, chance))

    def _copies(self, results: Mapping[str, Result]) -> Metric:
        distances = self._gathered(results, "nearest", "distances")[:, 0]
        real = self._gathered(results, "nearest-real", "distances")[:, 0]
        labels = self._test.part(self._seed, 1, HELD_OUT).labels
        estimate = near_copies(distances, results["classes"]["labels"], real, labels, seed=self._seed)
        floor = near_copies(real, labels, real, labels, seed=self._seed)
        return Metric("share of near copies", estimate, floor, bounds=(0, 1))

    def _whole_bound(self, results: Mapping[str, Result]) -> Bound:
        return Bound.join([Bound(**results[f"bound-{first}"]) for first in range(0, BOUND_IMAGES, BOUND_CHUNK)])

    def _gathered(self, results: Mapping[str, Result], unit: str, name: str) -> NDArray[Any]:
        total = HELD_OUT if unit == "nearest-real" else self._n
        return np.concatenate([results[f"{unit}-{first}"][name] for first in range(0, total, CHUNK)])

    def _mean(self, values: NDArray[np.float64]) -> Estimate:
        return bootstrap.mean(values, seed=self._seed, which=Resampled.REAL)
