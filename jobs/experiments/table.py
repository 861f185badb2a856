"""The table of experiments: what can be trained, and how each is sampled. Importable without torch."""

from dataclasses import dataclass

from diffusion.problems.fashion_mnist import FashionMnistProblem
from diffusion.problems.gaussian1d import Gaussian1dProblem
from diffusion.problems.mnist import MnistProblem
from diffusion.problems.own_images import OwnClassesProblem, OwnImagesProblem
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
    """How to sample by default: the fewest evaluations as good as 1,000 ancestral steps (docs/evaluation.md)."""
    guidance: float = 1.0
    """How far a network that is told classes exaggerates them by default."""
    cpu_advice: str | None = None
    """What to say before a training starts on a CPU."""


EXPERIMENTS: dict[str, Entry] = {
    "1d": Entry(
        preset=ExperimentConfig(
            data=Gaussian1dProblem(),
            model=MlpSettings(),
            train=TrainSettings(steps=4000, batch_size=2048, lr=4e-3, precision="fp32", held_out_every=200),
        ),
        help="an MLP on a Gaussian mixture, checked against the exact answer: a minute on a laptop",
        sub_batch_size=4096,
        shard_size=65536,
        sampler=SamplerSettings(sampler="dpm++", steps=30),
    ),
    "1d-classes": Entry(
        preset=ExperimentConfig(
            data=Gaussian1dProblem(),
            model=ClassMlpSettings(),
            train=TrainSettings(steps=4000, batch_size=2048, lr=4e-3, precision="fp32"),
        ),
        help="the same with classes, which are the mixture's components",
        sub_batch_size=4096,
        shard_size=65536,
        sampler=SamplerSettings(sampler="dpm++", steps=30),
    ),
    "mnist": Entry(
        preset=ExperimentConfig(
            data=MnistProblem(),
            model=UnetSettings(),
            train=TrainSettings(
                steps=40_000, batch_size=128, lr=4e-4, warmup_steps=500, ema_decay=0.9995, held_out_every=500
            ),
        ),
        help="a DDPM on MNIST with a U-Net of 9.9 million parameters: for GPUs",
        sub_batch_size=256,
        shard_size=1024,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
        cpu_advice="mnist is sized for GPUs: {steps:,} steps of {batch_size} images take about {duration} on this "
        "CPU. `python launch.py train mnist-small` draws recognisable digits after a few minutes.",
    ),
    "mnist-small": Entry(
        preset=ExperimentConfig(
            data=MnistProblem(),
            model=UnetSettings(dim=32, dim_mults=(1, 2), attn_heads=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(
                steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, held_out_every=200, checkpoint_every=500
            ),
        ),
        help="a DDPM on MNIST that trains in minutes on a CPU",
        sub_batch_size=64,
        shard_size=256,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
    "mnist-classes": Entry(
        preset=ExperimentConfig(
            data=MnistProblem(),
            model=ClassUnetSettings(),
            train=TrainSettings(steps=40_000, batch_size=128, lr=4e-4, warmup_steps=500, ema_decay=0.9995),
        ),
        help="digits on demand: a DDPM on MNIST that is told the digit, for GPUs",
        sub_batch_size=256,
        shard_size=1024,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
        cpu_advice="mnist-classes is sized for GPUs: {steps:,} steps of {batch_size} images take about {duration} on "
        "this CPU. `python launch.py train mnist-classes-small` draws recognisable digits after a few minutes.",
    ),
    "mnist-classes-small": Entry(
        preset=ExperimentConfig(
            data=MnistProblem(),
            model=ClassUnetSettings(dim=32, dim_mults=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, checkpoint_every=500),
        ),
        help="digits on demand, trained in minutes on a CPU",
        sub_batch_size=64,
        shard_size=256,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
    "fashion-mnist-small": Entry(
        preset=ExperimentConfig(
            data=FashionMnistProblem(),
            model=UnetSettings(dim=32, dim_mults=(1, 2), attn_heads=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(
                steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, held_out_every=200, checkpoint_every=500
            ),
        ),
        help="a DDPM on Fashion-MNIST that trains in minutes on a CPU",
        sub_batch_size=64,
        shard_size=256,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
    "images": Entry(
        preset=ExperimentConfig(
            data=OwnImagesProblem(),
            model=UnetSettings(dim=32, dim_mults=(1, 2), attn_heads=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, checkpoint_every=500),
        ),
        help="a DDPM on images of your own: --data.root FOLDER",
        sub_batch_size=64,
        shard_size=256,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
    "images-classes": Entry(
        preset=ExperimentConfig(
            data=OwnClassesProblem(),
            model=ClassUnetSettings(dim=32, dim_mults=(1, 2), noise_skip=True, patch_size=2),
            train=TrainSettings(steps=4000, batch_size=64, lr=4e-3, ema_decay=0.998, checkpoint_every=500),
        ),
        help="the same on demand: it is told the class, which is an image's folder",
        sub_batch_size=64,
        shard_size=256,
        sampler=SamplerSettings(sampler="ddpm", steps=50),
    ),
}
