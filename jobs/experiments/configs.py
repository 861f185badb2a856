"""The settings of an experiment, whatever its problem. Importable without torch."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffusion.problems.problem import Problem
from diffusion.settings import ClassSettings, DiffusionSettings, ModelSettings, require
from jobs.experiments.settings import TrackingSettings, TrainSettings

if TYPE_CHECKING:
    from diffusion.process.model import Experiment
    from diffusion.statistics.evaluator import Drawn, Evaluator


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Settings of an experiment."""

    data: Problem
    model: ModelSettings
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    train: TrainSettings
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        self.data.check(self.model)
        rule = "train.evaluate-every is for 1d and digits: nothing judges other samples within seconds"
        require(self.train.evaluate_every == 0 or self.data.has_glance, rule, self.train.evaluate_every)

    @property
    def knows_classes(self) -> bool:
        """Whether the network is told classes; the data may still have to say how many there are."""
        return isinstance(self.model, ClassSettings)

    @property
    def num_classes(self) -> int:
        """Classes that the network is told; 0 if it is told none."""
        return self.data.num_classes if self.knows_classes else 0

    def absolute(self) -> "ExperimentConfig":
        """Returns the same settings where another working folder must find the same files."""
        return replace(self, data=self.data.absolute())

    def moved(self, root: str | None) -> "ExperimentConfig":
        """Returns the same settings with the data in the folder `root`, None being where they were."""
        return replace(self, data=self.data.moved(root))

    def build(self) -> "Experiment":
        """Builds the experiment itself; imports torch."""
        return self.data.build(self.model, self.diffusion)

    def evaluator(self, drawn: "Drawn") -> "Evaluator":
        """Builds the evaluation of samples; imports torch."""
        return self.data.evaluator(self.model, self.diffusion, drawn)
