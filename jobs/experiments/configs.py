"""The settings of each kind of experiment, and how to build it. Importable without torch."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.data import mnist
from diffusion.settings import (
    DiffusionSettings,
    MixtureSettings,
    MlpSettings,
    MnistSettings,
    UnetSettings,
    require,
)
from jobs.experiments.settings import TrackingSettings, TrainSettings
from jobs.files import sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffusion.gaussian1d.experiment import Gaussian1d
    from diffusion.images.experiment import Mnist
    from diffusion.statistics.evaluator import Drawn, Evaluator

CLASSIFIER = Path(__file__).resolve().parent.parent.parent / "diffusion" / "digits" / "digits.safetensors"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Gaussian1dConfig:
    """Settings of the 1D experiment."""

    data: MixtureSettings = field(default_factory=MixtureSettings)
    model: MlpSettings = field(default_factory=MlpSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    train: TrainSettings
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def absolute(self) -> "Gaussian1dConfig":
        """The same settings where another working folder must find the same files."""
        return self

    def prepare(self, say: Say) -> None:
        """The data are drawn, there is nothing to fetch."""

    def build(self) -> "Gaussian1d":
        """The experiment itself; imports torch."""
        from diffusion.gaussian1d.experiment import Gaussian1d

        return Gaussian1d(self.data, self.model, self.diffusion)

    def evaluation_sha256(self, inception: bool) -> dict[str, str]:
        """What an evaluation rests on besides samples and weights: here the mixture; no pictures for Inception."""
        require(not inception, "--inception-fid is for digits", "1d")
        mixture = json.dumps(dataclasses.asdict(self.data), sort_keys=True)
        return {"data": hashlib.sha256(mixture.encode()).hexdigest()}

    def evaluator(self, drawn: "Drawn", protocol: Mapping[str, Any]) -> "Evaluator":
        """The evaluation of samples."""
        from diffusion.gaussian1d.evaluation import Evaluator1d

        return Evaluator1d(self.build(), *drawn, seed=protocol["seed"])


@dataclass(frozen=True, kw_only=True)
class MnistConfig:
    """Settings of the MNIST experiments."""

    data: MnistSettings = field(default_factory=MnistSettings)
    model: UnetSettings = field(default_factory=UnetSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    train: TrainSettings
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def absolute(self) -> "MnistConfig":
        """The same settings where another working folder must find the same files."""
        return replace(self, data=replace(self.data, root=str(Path(self.data.root).absolute())))

    def prepare(self, say: Say) -> None:
        """Fetches what is missing of the data; raises ValueError when they are wrong or cannot be had."""
        mnist.fetch(Path(self.data.root), say=say)

    def build(self) -> "Mnist":
        """The experiment itself; imports torch."""
        from diffusion.images.experiment import Mnist

        def load_images() -> "NDArray[np.uint8]":
            mnist.require(Path(self.data.root))
            return mnist.read_images(Path(self.data.root), "train")

        return Mnist(load_images, self.model, self.diffusion)

    def evaluation_sha256(self, inception: bool) -> dict[str, str]:
        """What an evaluation rests on besides samples and weights: the digits, and the networks for its features.

        Raises ValueError if Inception is asked for and its weights are not on this machine.
        """
        files = json.dumps(mnist.FILES, sort_keys=True)
        found = {"data": hashlib.sha256(files.encode()).hexdigest(), "features": sha256(CLASSIFIER)}
        if inception:
            from diffusion.images.inception import weights_path

            found["inception"] = sha256(weights_path())
        return found

    def evaluator(self, drawn: "Drawn", protocol: Mapping[str, Any]) -> "Evaluator":
        """The evaluation of samples."""
        from diffusion.digits.evaluation import Digits, EvaluatorMnist

        def load(split: mnist.Split) -> Digits:
            root = Path(self.data.root)
            mnist.require(root)
            images, labels = mnist.read_images(root, split), mnist.read_labels(root, split)
            return Digits(images[..., None], labels)

        inception = "inception" in protocol["sha256"]
        return EvaluatorMnist(load, drawn.samples, drawn.model, protocol["seed"], inception)


ExperimentConfig = Gaussian1dConfig | MnistConfig
