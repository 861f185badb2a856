"""The evaluation of images by what needs no classifier: near copies, bits per dimension, and Inception if asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffusion.images.nearest import nearest
from diffusion.images.pixels import Images
from diffusion.process.model import DiffusionModel
from diffusion.process.randomness import Stream, permutation
from diffusion.statistics import bits_per_dim, bits_table, bootstrap, flow
from diffusion.statistics.bits_per_dim import Bound
from diffusion.statistics.bootstrap import Estimate, Resampled
from diffusion.statistics.evaluator import Drawn, Evaluator, Metric, Result, Table, Unit
from diffusion.statistics.features import frechet

LARGEST = 10_000
"""Samples that are used, and real ones beside them: as many as there are test images of MNIST, for the floors."""
CHUNK = 500
"""Images whose nearest training images are looked for in one unit."""
HELD_OUT = 4_000
"""Test images whose nearest training images say what is near; fewer where the data set has fewer."""
NEAR_PERCENT = 1.0
"""A sample is a near copy if it is nearer to a training image than this percentage of the held-out images."""
BOUND_IMAGES, BOUND_CHUNK, STRATA = 512, 32, 63
"""Test images whose bits per dimension are taken, how many in a unit, and timesteps for each beside t = 0."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class RealImages:
    """Images of a data set [n, height, width, channels] and their classes [n]."""

    images: Images
    labels: NDArray[np.uint8]

    def part(self, seed: int, which: int, n: int) -> "RealImages":
        """Draws n of them without replacement: the first ones of MNIST's test digits are easier than the last."""
        chosen = permutation(seed, Stream.EVALUATION, which, len(self.images))[:n]
        return RealImages(self.images[chosen], self.labels[chosen])

    def like(self, asked: NDArray[np.int64] | None, seed: int, which: int, n: int) -> "RealImages":
        """Draws n of them so that the i-th is of class asked[i]; leaves out what a class has too few images for."""
        if asked is None:
            return self.part(seed, which, n)
        chosen = np.full(n, -1)
        for k in np.unique(asked):
            own, places = np.flatnonzero(self.labels == k), np.flatnonzero(asked == k)
            drawn = own[permutation(seed, Stream.EVALUATION, which, len(own))][: len(places)]
            chosen[places[: len(drawn)]] = drawn
        chosen = chosen[chosen >= 0]
        return RealImages(self.images[chosen], self.labels[chosen])


class ImageEvaluator(Evaluator):
    """Judges samples [n, height, width, channels], and the model that drew them; without it the samples alone."""

    def __init__(self, load: Callable[[Literal["train", "test"]], RealImages], drawn: Drawn, noun: str) -> None:
        """`noun` is what tables call the images."""
        self._load, self._noun, self._model, self._seed = load, noun, drawn.model, drawn.seed
        self._inception, self._likelihood = drawn.inception, drawn.likelihood
        self._samples: Images = drawn.samples[:LARGEST]
        self._n = len(self._samples)
        # The bound and the flow ask the network without a class: so they compare with those of a model that has none.
        self._without = ", without a class" if drawn.model is not None and drawn.model.num_classes else ""
        self._asked = drawn.classes[: self._n] if drawn.classes is not None else None
        self._size = f"{self._n}"  # of real images, in the names of results that sets of one size share
        if self._asked is not None:
            self._size += "-" + "-".join(map(str, np.bincount(self._asked)))

    @property
    def num_judged(self) -> int:
        return self._n

    @cached_property
    def _train(self) -> RealImages:
        return self._load("train")

    @cached_property
    def _test(self) -> RealImages:
        return self._load("test")

    @cached_property
    def _real(self) -> RealImages:
        """Training images, as many as samples."""
        return self._train.like(self._asked, self._seed, 0, self._n)

    @cached_property
    def _held_out(self) -> RealImages:
        """Test images, as many as samples; fewer of a class that has fewer."""
        return self._test.like(self._asked, self._seed, 1, self._n)

    @cached_property
    def _judges(self) -> RealImages:
        """Test images whose nearest training images say what is near."""
        return self._test.part(self._seed, 1, HELD_OUT)

    @cached_property
    def _bounded(self) -> Images:
        """Test images whose bits per dimension are taken."""
        return self._test.part(self._seed, 1, BOUND_IMAGES).images

    def units(self) -> dict[str, Unit]:
        n, units = self._n, {}
        for first in range(0, n, CHUNK):
            units[f"nearest-{first}"] = Unit("samples", partial(self._nearest, first))
        for first in range(0, len(self._judges.images), CHUNK):
            units[f"nearest-real-{first}"] = Unit("weights", partial(self._nearest_real, first))
        for first in range(0, n if self._inception else 0, CHUNK):
            units[f"inception-{first}"] = Unit("samples", partial(self._inception_features, "samples", first))
            for of, real in (("train", self._real), ("test", self._held_out)):
                if first < len(real.images):
                    unit = Unit("weights", partial(self._inception_features, of, first))
                    units[f"inception-{of}-{self._size}-{first}"] = unit
        if self._model is not None:
            for first in range(0, len(self._bounded), BOUND_CHUNK):
                units[f"bound-{first}"] = Unit("weights", partial(self._bound, self._model, first))
            for first in range(0, len(self._bounded) if self._likelihood else 0, BOUND_CHUNK):
                units[f"flow-{first}"] = Unit("weights", partial(self._flow, self._model, first))
        return units

    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        found = {"copies": self._copies(results)}
        if self._inception:
            found["inception_fid"] = self._inception_distance(results)
        if self._model is None:
            return found
        bound = self._whole_bound(results)
        return {
            **found,
            "test_loss": Metric(  # of many more timesteps than the held-out loss of a training
                f"loss of test {self._noun}{self._without}", self._mean(bits_table.mean_loss(bound)), None
            ),
            "bits_per_dim": Metric(
                f"bits per dimension of test {self._noun}{self._without}", self._mean(bound.total), None
            ),
            **(self._flow_metrics(results) if self._likelihood else {}),
        }

    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        if self._model is None:
            return {}
        title = f"Bits per dimension and loss of {len(self._bounded)} test {self._noun}, by timestep{self._without}"
        return {"bound": Table(title, bits_table.rows(self._whole_bound(results)))}

    def curves(self, results: Mapping[str, Result]) -> dict[str, Any]:
        return {} if self._model is None else {"bound_by_t": bits_table.curves(self._whole_bound(results))}

    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        from diffusion.images import figures  # here, because plotting libraries take a second to import

        figures.real_beside_generated(self._held_out.images, self._samples, folder / "real-beside-generated.png")

    def _nearest(self, first: int) -> Result:
        distances, indices = nearest(self._samples[first : first + CHUNK], self._train.images, NEIGHBOURS)
        return {"distances": distances, "indices": indices}

    def _nearest_real(self, first: int) -> Result:
        distances, _ = nearest(self._judges.images[first : first + CHUNK], self._train.images)
        return {"distances": distances}

    def _bound(self, model: DiffusionModel, first: int) -> Result:
        images, denoiser = self._bounded[first : first + BOUND_CHUNK], model.denoiser((-1, 1))
        timesteps = len(denoiser.alphas_cumprod)
        edges = bits_per_dim.strata(timesteps, min(STRATA, timesteps - 1))
        return vars(bits_per_dim.bound(denoiser, images, first=first, seed=self._seed, edges=edges))

    def _flow(self, model: DiffusionModel, first: int) -> Result:
        images = self._bounded[first : first + BOUND_CHUNK]
        return flow.bits(model.denoiser((-1, 1)), images, first=first, seed=self._seed)

    def _flow_metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        labels = {"model": "bits by the flow (ODE), its own noise", "uniform": "bits by the flow (ODE), uniform noise"}
        parts = [results[f"flow-{first}"] for first in range(0, len(self._bounded), BOUND_CHUNK)]
        return {
            f"flow_bits_{noise}": Metric(
                label + self._without, self._mean(np.concatenate([part[noise] for part in parts])), None
            )
            for noise, label in labels.items()
        }

    def _inception_features(self, of: str, first: int) -> Result:
        from diffusion.images.inception import inception_features  # here, because few ask for it

        images = self._samples if of == "samples" else (self._real if of == "train" else self._held_out).images
        return {"features": inception_features(images[first : first + CHUNK]).astype(np.float32)}

    def _inception_distance(self, results: Mapping[str, Result]) -> Metric:
        train, test = (self._gathered(results, f"inception-{of}-{self._size}", "features") for of in ("train", "test"))
        own = self._gathered(results, "inception", "features")
        # Without intervals: a resample would need the roots of two matrices of 2,048 rows, and there are hundreds.
        return Metric("Inception FID", frechet(train, own), frechet(train, test))

    def _copies(self, results: Mapping[str, Result]) -> Metric:
        distances, real = (self._gathered(results, unit, "distances")[:, 0] for unit in ("nearest", "nearest-real"))
        near = np.percentile(real, NEAR_PERCENT)
        estimate, floor = (
            bootstrap.mean(found < near, seed=self._seed, which=Resampled.FAKE) for found in (distances, real)
        )
        return Metric("share of near copies", estimate, floor, bounds=(0, 1))

    def _whole_bound(self, results: Mapping[str, Result]) -> Bound:
        return Bound.join([Bound(**results[f"bound-{first}"]) for first in range(0, len(self._bounded), BOUND_CHUNK)])

    def _gathered(self, results: Mapping[str, Result], unit: str, name: str) -> NDArray[Any]:
        chunks = [f"{unit}-{first}" for first in range(0, LARGEST, CHUNK)]
        return np.concatenate([results[chunk][name] for chunk in chunks if chunk in results])

    def _mean(self, values: NDArray[np.float64]) -> Estimate:
        return bootstrap.mean(values, seed=self._seed, which=Resampled.REAL)
