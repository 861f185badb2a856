"""What a problem is: a data set, and how a model of it is built and judged. Importable without torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion.settings import DiffusionSettings, ModelSettings, require

if TYPE_CHECKING:
    from diffusion.process.model import Experiment
    from diffusion.statistics.evaluator import Drawn, Evaluator

Say = Callable[[str], None]


@dataclass(frozen=True)
class SampleFormat:
    """What samples are in files."""

    dtype: str
    shape: tuple[int, ...]
    """Shape of one sample."""
    fewest: int
    """`evaluate` refuses smaller sets."""

    @property
    def num_bytes(self) -> int:
        """The size of one sample in a file."""
        return {"float32": 4, "uint8": 1}[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """Holds the settings of a data set as its fields, and knows all else that distinguishes it from other ones.

    The fields are the flags --data.*, and `data` in experiment.json.
    """

    metrics_version: ClassVar[int] = 1
    """Raise it with every change of what `evaluate` computes: results of another version are not used."""
    has_glance: ClassVar[bool] = False
    """Whether its evaluator has numbers that take seconds, for curves during a training."""

    @property
    def num_classes(self) -> int:
        """Classes of the data; 0 where they have none."""
        return 0

    @property
    @abstractmethod
    def sample(self) -> SampleFormat:
        """What samples are in files."""

    @property
    def about(self) -> str:
        """Says in a sentence what the data are."""
        return " ".join((type(self).__doc__ or "").split("\n\n")[0].split())

    @property
    def remark(self) -> str:
        """Says, in a sentence, what readers of an evaluation should know; mostly nothing."""
        return ""

    @abstractmethod
    def check(self, model: ModelSettings) -> None:
        """Raises SettingsError if the model does not fit the data."""

    def absolute(self) -> Self:
        """Returns the same settings where another working folder must find the same files."""
        return self

    def moved(self, root: str | None) -> Self:
        """Returns the same settings with the data in the folder `root`, None being where they were.

        Raises SettingsError if they are not in files, or if the folder where they were is gone.
        """
        require(root is None, "data.root is for data that lie in files", root)
        return self

    @abstractmethod
    def prepare(self, say: Say) -> None:
        """Fetches what is missing of the data; raises UserError when they are wrong or cannot be had."""

    @abstractmethod
    def digest(self, *, inception: bool) -> Mapping[str, str]:
        """Names what an evaluation rests on besides samples and weights, each by its sha256.

        Raises UserError if Inception is asked for and cannot be had.
        """

    @abstractmethod
    def build(self, model: Any, diffusion: DiffusionSettings) -> "Experiment":
        """Builds the experiment; imports torch."""

    @abstractmethod
    def evaluator(self, model: Any, diffusion: DiffusionSettings, drawn: "Drawn") -> "Evaluator":
        """Builds the evaluation of samples; imports torch."""
