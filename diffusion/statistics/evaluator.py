"""What an evaluation of any experiment is: units of work, and metrics beside their floors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.process.model import DiffusionModel
from diffusion.settings import SamplerSettings
from diffusion.statistics.bootstrap import Estimate

Result = Mapping[str, NDArray[Any]]
"""What a unit computes: arrays by name, small enough to be kept in a file."""
Better = Literal["lower", "higher", "near"]
"""Where a good model's value lies; "near" means near the floor, which is then the exact value."""


class Drawn(NamedTuple):
    """Samples, what drew them, and how they are to be judged."""

    samples: NDArray[Any]
    model: DiffusionModel | None
    """None if the weights no longer exist; then only metrics of the samples are computed."""
    sampler: SamplerSettings
    classes: NDArray[np.int64] | None = None
    """The class that each sample was to be of, [n]; None for models without classes."""
    seed: int = 0
    """Decides all that is drawn in the evaluation."""
    inception: bool = False
    """Whether Inception's features are asked for."""
    likelihood: bool = False
    """Whether that of the flow is asked for, where it costs much."""


class Unit(NamedTuple):
    """A part of the work. One process does it alone, so its result does not depend on the number of processes."""

    of: Literal["samples", "weights"]
    """"weights": the result depends on the checkpoint only and is shared by all its sample sets. "samples": it belongs
    to one set."""
    compute: Callable[[], Result]


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation and its floor: the value of a perfect model with as many samples."""

    label: str
    estimate: Estimate | float
    """A plain number if there is no chance in it."""
    floor: Estimate | float | None
    better: Better = "lower"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """The smallest and the largest possible value; an interval goes no further."""

    @property
    def value(self) -> float:
        return self.estimate.value if isinstance(self.estimate, Estimate) else self.estimate

    def as_json(self) -> dict[str, Any]:
        """Returns value and floor with their 95% ranges, where they have one."""
        low, high = self._range(self.estimate)
        floor = self.floor.value if isinstance(self.floor, Estimate) else self.floor
        floor_low, floor_high = self._range(self.floor)
        return {
            "label": self.label,
            "value": self.value,
            "low": low,
            "high": high,
            "floor": floor,
            "floor_low": floor_low,
            "floor_high": floor_high,
            "better": self.better,
        }

    def _range(self, number: Estimate | float | None) -> tuple[float | None, float | None]:
        """The 95% interval of an estimate."""
        if not isinstance(number, Estimate):
            return None, None
        least, most = self.bounds
        low, high = number.interval()
        # Shifted replicates may lie beyond what is possible, such as a share of more than 1.
        return min(max(low, least), most), max(min(high, most), least)


def pack(number: Estimate) -> NDArray[np.float64]:
    """Returns an estimate as one array, [1 + REPLICATES]."""
    return np.concatenate([[number.value], number.replicates])


def unpack(array: NDArray[np.float64]) -> Estimate:
    """Undoes `pack`."""
    return Estimate(float(array[0]), array[1:])


class Table(NamedTuple):
    """Numbers that belong together; a row maps names of columns to values."""

    title: str
    rows: Sequence[Mapping[str, str | float]]


class Evaluator(ABC):
    """The evaluation of one set of samples and of the model that drew it."""

    @property
    @abstractmethod
    def num_judged(self) -> int:
        """Samples that are judged: the first ones, of more than can be compared."""

    @abstractmethod
    def units(self) -> dict[str, Unit]:
        """Returns all parts of the work by name, in a fixed order, long ones first."""

    @abstractmethod
    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        """Computes the numbers from the results of all units."""

    def glance(self) -> dict[str, Metric]:
        """Computes the few numbers that need the samples alone and take seconds, if the problem has any."""
        return {}

    @abstractmethod
    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        """Makes the tables that people want to see beside the metrics."""

    @abstractmethod
    def curves(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Returns what is too long for a table, as JSON takes it."""

    @abstractmethod
    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        """Draws the figures into `folder`."""
