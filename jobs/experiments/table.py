"""The table of experiments: what can be trained, and how each is sampled. Importable without torch."""

from dataclasses import dataclass

from diffusion.problems.fashion_mnist import FashionMnistProblem
from diffusion.problems.gaussian1d import Gaussian1dProblem
from diffusion.problems.mnist import MnistProblem
from diffusion.problems.own_images import OwnClassesProblem, OwnImagesProblem
from diffusion.problems.problem import Problem
from diffusion.settings import ClassMlpSettings, ClassUnetSettings, MlpSettings, SamplerSettings, UnetSettings
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An experiment of the table."""

    preset: ExperimentConfig
    help: str
    sub_batch_size: int
    """Samples that go through the network together. A constant: they depend on it in the last bits."""
    shard_size: int
    """Samples in one file, a multiple of sub_batch_size."""
    sampler: SamplerSettings
    """How to sample by default; docs/evaluation.md says why."""
    guidance: float = 1.0
    """How far a network that is told classes exaggerates them by default."""
    autoguidance: float = 1.0
    """How far predictions are led away from those of an earlier checkpoint by default, if the run has kept one."""
    cpu_advice: str | None = None
    """What to say before a training starts on a CPU."""


# For minutes on a CPU: on patches of 2 x 2 pixels, a step is about three times as fast as that of a network of half the
# width on all pixels. Our linear attention multiplies all pairs of heads, so few of them cost much less.
SMALL_UNET = UnetSettings(dim=32, dim_mults=(1, 2), attn_heads=(1, 2), noise_skip=True, patch_size=2)
SMALL_CLASS_UNET = ClassUnetSettings(dim=32, dim_mults=(1, 2), noise_skip=True, patch_size=2)


HALF_HIDDEN = (0.1, 0.9)
"""Noise levels at which most images are half hidden. Chosen for `mnist-small` (benchmarks/README.md), tried on no other
data."""


def _of_numbers(help: str, model: MlpSettings, held_out_every: int = 0) -> Entry:
    """An experiment on the mixture in one dimension."""
    # fp32, because everything is compared with the exact answer, and bf16 keeps two to three digits. A step of so small
    # a network takes too little time for any to be won by compiling.
    train = TrainSettings(
        steps=4000, batch_size=2048, lr=4e-3, precision="fp32", compile="never", held_out_every=held_out_every
    )
    preset = ExperimentConfig(data=Gaussian1dProblem(), model=model, train=train)
    sampler = SamplerSettings(sampler="dpm++", steps=30)
    # On a CPU so small a network is fastest with 2,000 to 8,000 samples at a time; with a whole shard it takes three
    # times as long.
    return Entry(preset=preset, help=help, sub_batch_size=4096, shard_size=65536, sampler=sampler)


def _of_digits(name: str, help: str, model: UnetSettings, held_out_every: int = 0) -> Entry:
    """An experiment on digits for GPUs; NAME-small is the same for a CPU."""
    train = TrainSettings(
        steps=40_000, batch_size=128, lr=4e-4, warmup_steps=500, ema_decay=0.9995, held_out_every=held_out_every
    )
    advice = (
        f"{name} is sized for GPUs: {{steps:,}} steps of {{batch_size}} images take about {{duration}} on this CPU. "
        f"`python launch.py train {name}-small` draws recognisable digits after a few minutes."
    )
    # More than small networks need: how few are enough for this one was not measured.
    sampler = SamplerSettings(sampler="sde-dpm++", steps=50)
    preset = ExperimentConfig(data=MnistProblem(), model=model, train=train)
    return Entry(preset=preset, help=help, sub_batch_size=256, shard_size=1024, sampler=sampler, cpu_advice=advice)


def _small(
    help: str,
    data: Problem,
    model: UnetSettings,
    held_out_every: int = 0,
    noise_levels: tuple[float, float] | None = None,
    autoguidance: float = 1.0,
) -> Entry:
    """An experiment on images that trains in minutes on a CPU."""
    train = TrainSettings(
        steps=4000,
        batch_size=64,
        lr=4e-3,
        ema_decay=0.998,
        noise_levels=noise_levels,
        checkpoint_every=500,
        keep_every=1000 if autoguidance != 1 else 0,
        held_out_every=held_out_every,
    )
    preset = ExperimentConfig(data=data, model=model, train=train)
    sampler = SamplerSettings(sampler="sde-dpm++", steps=20)
    return Entry(
        preset=preset, help=help, sub_batch_size=64, shard_size=256, sampler=sampler, autoguidance=autoguidance
    )


EXPERIMENTS: dict[str, Entry] = {
    "1d": _of_numbers(
        "an MLP on a Gaussian mixture, checked against the exact answer: a minute on a laptop", MlpSettings(), 200
    ),
    "1d-classes": _of_numbers("the same with classes, which are the mixture's components", ClassMlpSettings()),
    "mnist": _of_digits(
        "mnist", "a DDPM on MNIST with a U-Net of 9.9 million parameters: for GPUs", UnetSettings(), 500
    ),
    "mnist-small": _small(
        "a DDPM on MNIST that trains in minutes on a CPU", MnistProblem(), SMALL_UNET, 200, HALF_HIDDEN, 2.0
    ),
    "mnist-classes": _of_digits(
        "mnist-classes", "digits on demand: a DDPM on MNIST that is told the digit, for GPUs", ClassUnetSettings()
    ),
    "mnist-classes-small": _small("digits on demand, trained in minutes on a CPU", MnistProblem(), SMALL_CLASS_UNET),
    "fashion-mnist-small": _small(
        "a DDPM on Fashion-MNIST that trains in minutes on a CPU", FashionMnistProblem(), SMALL_UNET, 200
    ),
    "images": _small("a DDPM on images of your own: --data.root FOLDER", OwnImagesProblem(), SMALL_UNET),
    "images-classes": _small(
        "the same on demand: it is told the class, which is an image's folder", OwnClassesProblem(), SMALL_CLASS_UNET
    ),
}
