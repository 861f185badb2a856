"""The 1D mixture. Importable without torch."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusion.problems.problem import Problem, SampleFormat, Say
from diffusion.settings import DiffusionSettings, MixtureSettings, MlpSettings, ModelSettings, require

if TYPE_CHECKING:
    from diffusion.gaussian1d.experiment import Gaussian1d
    from diffusion.statistics.evaluator import Drawn, Evaluator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian1dProblem(MixtureSettings, Problem):
    """A Gaussian mixture in one dimension, whose diffusion is known in closed form."""

    metrics_version = 4  # since sde-dpm++ is among the samplers that are compared
    has_glance = True

    @property
    def num_classes(self) -> int:
        """The components."""
        return len(self.means)

    @property
    def sample(self) -> SampleFormat:
        return SampleFormat("float32", (), fewest=2)

    def check(self, model: ModelSettings) -> None:
        """Does nothing: any multilayer perceptron takes one dimension."""

    def prepare(self, say: Say) -> None:
        """Does nothing: the data are drawn."""

    def digest(self, *, inception: bool) -> Mapping[str, str]:
        require(not inception, "--inception-fid is for images", "1d")
        mixture = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return {"data": hashlib.sha256(mixture.encode()).hexdigest()}

    def build(self, model: MlpSettings, diffusion: DiffusionSettings) -> "Gaussian1d":
        from diffusion.gaussian1d.experiment import Gaussian1d

        return Gaussian1d(self, model, diffusion)

    def evaluator(self, model: MlpSettings, diffusion: DiffusionSettings, drawn: "Drawn") -> "Evaluator":
        from diffusion.gaussian1d.evaluation import Evaluator1d

        return Evaluator1d(self.build(model, diffusion), drawn)
