"""What an evaluation is, whatever the experiment: units of work, and metrics beside what a perfect model would have."""

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
"""Where a good model's value lies; near is at the floor, whose value is then the exact one."""


class Drawn(NamedTuple):
    """Samples, and what drew them."""

    samples: NDArray[Any]
    model: DiffusionModel | None
    """None where the weights are no longer there: then the samples tell what they can alone."""
    sampler: SamplerSettings


class Unit(NamedTuple):
    """A part of the work that one process does alone, so that its result does not depend on how many there are."""

    of: Literal["samples", "weights"]
    """What the result depends on, besides the data: one of the weights serves all sets of samples drawn with them."""
    compute: Callable[[], Result]


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation, beside its floor: the same number of a perfect model with as many samples."""

    label: str
    estimate: Estimate | float
    """A plain number where no chance is in it."""
    floor: Estimate | float | None
    better: Better = "lower"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Within which the number lies by its nature; an interval goes no further."""

    @property
    def value(self) -> float:
        return self.estimate.value if isinstance(self.estimate, Estimate) else self.estimate

    def as_json(self) -> dict[str, Any]:
        """Value and floor with their 95% ranges, where they have one."""
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
        return min(max(low, least), most), max(min(high, most), least)


def pack(number: Estimate) -> NDArray[np.float64]:
    """An estimate as one array, [1 + REPLICATES]."""
    return np.concatenate([[number.value], number.replicates])


def unpack(array: NDArray[np.float64]) -> Estimate:
    """What `pack` packed."""
    return Estimate(float(array[0]), array[1:])


class Table(NamedTuple):
    """Numbers that belong together, each row by the names of its columns."""

    title: str
    rows: Sequence[Mapping[str, str | float]]


class Evaluator(ABC):
    """The evaluation of one set of samples and of the model that drew it."""

    @abstractmethod
    def units(self) -> dict[str, Unit]:
        """All parts of the work by name, in a fixed order, long ones first."""

    @abstractmethod
    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        """The numbers, from the results of all units."""

    @abstractmethod
    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        """What people want to see beside the metrics."""

    @abstractmethod
    def curves(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """What is more than a table, as JSON takes it."""

    @abstractmethod
    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        """Draws the figures into `folder`."""
