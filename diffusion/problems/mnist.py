"""MNIST's digits, judged by a classifier of digits too. Importable without torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffusion.data.mnist import CLASSIFIER, MNIST
from diffusion.problems.images import ImageProblem

if TYPE_CHECKING:
    from diffusion.digits.evaluation import DigitEvaluator


@dataclass(frozen=True, kw_only=True)
class MnistProblem(ImageProblem):
    """The MNIST digits."""

    root: str = field(default_factory=MNIST.default_root)
    """Folder of the data set, as torchvision lays it out; fetched when missing. Default: $MNIST_ROOT, or data."""

    data_set = MNIST
    noun = "digits"
    has_glance = True
    classifier = CLASSIFIER

    @property
    def num_classes(self) -> int:
        """The digits."""
        return 10

    def evaluator_class(self) -> "type[DigitEvaluator]":
        from diffusion.digits.evaluation import DigitEvaluator

        return DigitEvaluator
