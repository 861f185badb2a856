"""The table of experiments: settings of each, presets, and how to build them. Importable without torch."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from diffusion.settings import (
    DiffusionSettings,
    MixtureSettings,
    MlpSettings,
    MnistSettings,
    SamplerSettings,
    UnetSettings,
    require,
)
from jobs import mnist_files
from jobs.files import sha256
from jobs.settings import TrackingSettings, TrainSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffusion.evaluation import Drawn, Evaluator
    from diffusion.gaussian1d import Gaussian1d
    from diffusion.mnist import Mnist

CLASSIFIER = Path(__file__).resolve().parent.parent / "diffusion" / "digits.safetensors"

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
        from diffusion.gaussian1d import Gaussian1d

        return Gaussian1d(self.data, self.model, self.diffusion)

    def evaluation_sha256(self, inception: bool) -> dict[str, str]:
        """What an evaluation rests on besides samples and weights: here the mixture; no pictures for Inception."""
        require(not inception, "--inception-fid is for digits", "1d")
        mixture = json.dumps(dataclasses.asdict(self.data), sort_keys=True)
        return {"data": hashlib.sha256(mixture.encode()).hexdigest()}

    def evaluator(self, drawn: "Drawn", protocol: Mapping[str, Any]) -> "Evaluator":
        """The evaluation of samples."""
        from diffusion.evaluate_1d import Evaluator1d

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
        mnist_files.fetch(Path(self.data.root), say=say)

    def build(self) -> "Mnist":
        """The experiment itself; imports torch."""
        from diffusion.mnist import Mnist

        def load_images() -> "NDArray[np.uint8]":
            mnist_files.require(Path(self.data.root))
            return mnist_files.read_images(Path(self.data.root), "train")

        return Mnist(load_images, self.model, self.diffusion)

    def evaluation_sha256(self, inception: bool) -> dict[str, str]:
        """What an evaluation rests on besides samples and weights: the digits, and the networks for its features.

        Raises ValueError if Inception is asked for and its weights are not on this machine.
        """
        files = json.dumps(mnist_files.FILES, sort_keys=True)
        found = {"data": hashlib.sha256(files.encode()).hexdigest(), "features": sha256(CLASSIFIER)}
        if inception:
            from diffusion.inception import weights_path

            found["inception"] = sha256(weights_path())
        return found

    def evaluator(self, drawn: "Drawn", protocol: Mapping[str, Any]) -> "Evaluator":
        """The evaluation of samples."""
        from diffusion.evaluate_mnist import Digits, EvaluatorMnist

        def load(split: mnist_files.Split) -> Digits:
            root = Path(self.data.root)
            mnist_files.require(root)
            images, labels = mnist_files.read_images(root, split), mnist_files.read_labels(root, split)
            return Digits(images[..., None], labels)

        inception = "inception" in protocol["sha256"]
        return EvaluatorMnist(load, drawn.samples, drawn.model, protocol["seed"], inception)


ExperimentConfig = Gaussian1dConfig | MnistConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An experiment of the table."""

    preset: ExperimentConfig
    help: str
    sub_batch_size: int
    """Samples that go through the network together. A constant: they depend on it in the last bits."""
    shard_size: int
    """Samples in one file, a multiple of sub_batch_size."""
    sample_dtype: str
    """Of samples in files."""
    sample_shape: tuple[int, ...]
    """Of one sample in files."""
    fewest_samples: int
    """That an evaluation makes sense of."""
    sampler: SamplerSettings
    """How to sample unless told otherwise: the fewest evaluations found as good as 1,000 ancestral steps (README)."""
    cpu_advice: str | None = None
    """What to say before a training starts on a CPU."""

    @property
    def bytes_per_sample(self) -> int:
        """In a file."""
        size = {"float32": 4, "uint8": 1}[self.sample_dtype]
        return size * math.prod(self.sample_shape)


EXPERIMENTS: dict[str, Entry] = {
    "1d": Entry(
        preset=Gaussian1dConfig(train=TrainSettings(steps=4000, batch_size=2048, lr=4e-3, precision="fp32")),
        help="an MLP on a Gaussian mixture, checked against the exact answer: a minute on a laptop",
        sub_batch_size=4096,
        shard_size=65536,
        sample_dtype="float32",
        sample_shape=(),
        fewest_samples=2,
        sampler=SamplerSettings(sampler="dpm++", steps=30),
    ),
    "mnist": Entry(
        preset=MnistConfig(
            train=TrainSettings(steps=40_000, batch_size=128, lr=4e-4, warmup_steps=500, ema_decay=0.9995)
        ),
        help="a DDPM on MNIST with a U-Net of 9.9 million parameters: for GPUs",
        sub_batch_size=256,
        shard_size=1024,
        sample_dtype="uint8",
        sample_shape=(28, 28, 1),
        fewest_samples=100,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
        cpu_advice="mnist is sized for GPUs: {steps:,} steps of {batch_size} images take about {duration} on this "
        "CPU. `python launch.py train mnist-small` draws recognisable digits after a few minutes.",
    ),
    "mnist-small": Entry(
        preset=MnistConfig(
            model=UnetSettings(dim=32, dim_mults=(1, 2), attn_heads=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, checkpoint_every=500),
        ),
        help="a DDPM on MNIST that trains in minutes on a CPU",
        sub_batch_size=64,
        shard_size=256,
        sample_dtype="uint8",
        sample_shape=(28, 28, 1),
        fewest_samples=100,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
}


def write(experiment: str, config: ExperimentConfig) -> str:
    """The content of experiment.json."""
    return json.dumps({"experiment": experiment, **dataclasses.asdict(config)}, indent=2) + "\n"


def read(text: str) -> tuple[str, ExperimentConfig]:
    """What `write` wrote; raises ValueError for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"experiment.json must hold an object; got {type(values).__name__}")
    experiment = values.pop("experiment", None)
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}; got {experiment}")
    return experiment, _from_dict(type(EXPERIMENTS[experiment].preset), values)


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[tuple[str, Any, Any]]:
    """(flag, old value, new value) of every setting that differs, named as on the command line."""
    a, b = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [(flag, a.get(flag), b.get(flag)) for flag in a.keys() | b.keys() if a.get(flag) != b.get(flag)]


MAY_CHANGE = frozenset(
    {
        "data.root",
        "train.log-every",
        "train.checkpoint-every",
        "train.checkpoint-minutes",
        "train.keep-checkpoints",
        "train.micro-batch-size",
        "train.cuda-graph",
        "tracking.mode",
        "tracking.project",
        "tracking.samples-every",
        "tracking.checkpoints",
    }
)
"""Settings that a continued run may change: they do not touch its result."""


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key.replace("_", "-")
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


C = TypeVar("C")


def _from_dict(cls: type[C], values: Any) -> C:
    """Builds nested dataclasses from JSON; raises ValueError where names or types do not fit."""
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"experiment.json must hold an object for {cls.__name__}; got {type(values).__name__}")
    for name in sorted(values.keys() - hints.keys()):
        raise ValueError(f"experiment.json holds a setting that this version does not know: {name}")
    # A setting that came after the run is what it was before it came: its default.
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}  # type: ignore[arg-type]
    for name in sorted(needed - values.keys()):
        raise ValueError(f"experiment.json lacks the setting {name}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _from_dict(hints[name], value)
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"experiment.json holds a value of the wrong type: {error}") from error
