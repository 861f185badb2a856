"""Sampling speed of a trained mnist-small: our samplers against the library's, on the same network.

`sample()` of the library with its defaults takes 1,000 ancestral steps; which of our settings are as good is in the
table of README, from `evaluate --all`.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Alternative, Measurements, Row, in_turn, ratio

if TYPE_CHECKING:
    from diffusion.model import DiffusionModel, Experiment
    from jobs.samples import SampleSet

BATCH_SIZE = 64
AS_GOOD_AS_1000 = {20: "Frechet distance", 50: "every metric"}
"""Ancestral steps whose 2,000 digits lie within the interval of those of 1,000 steps (README), and by which measure."""


def ours(run: Path, sampler: str, steps: int) -> Measurements:
    """Sub-batches as the sampling job draws them."""
    import torch

    from jobs.memory import keep_freed_memory
    from jobs.numerics import resolve_precision
    from jobs.sample import draw

    keep_freed_memory()  # as each of our jobs does
    samples = planned(run, BATCH_SIZE, sampler, steps)
    experiment, model = _load(samples)
    precision, first = resolve_precision("auto", "cpu"), 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        while True:
            started = time.perf_counter()
            x0 = draw(model.predict, model.alphas_cumprod, experiment, samples.settings, first, first + BATCH_SIZE)
            experiment.to_array(x0)
            yield {"images_per_s": BATCH_SIZE / (time.perf_counter() - started)}
            first += BATCH_SIZE


def library(run: Path, steps: int | None) -> Measurements:
    """`GaussianDiffusion.sample` around the library's U-Net; `steps` below 1,000 is its DDIM, None its default."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from torch import Tensor, nn

    from diffusion.mnist import Mnist, MnistModel, library_unet

    experiment, model = _load(planned(run, BATCH_SIZE, "ddim", 50))
    assert isinstance(experiment, Mnist) and isinstance(model, MnistModel)
    unet = library_unet(experiment.model_settings).eval()
    unet.load_state_dict(model.network.state_dict())
    model.network = unet

    class Network(nn.Module):
        """The model with what the library asks of a network."""

        channels = out_dim = 1
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
            return model.predict(x, t)

    peer: Any = GaussianDiffusion(
        Network(), image_size=28, objective="pred_noise", beta_schedule="linear", sampling_timesteps=steps
    )
    while True:
        started = time.perf_counter()
        peer.sample(batch_size=BATCH_SIZE)
        yield {"images_per_s": BATCH_SIZE / (time.perf_counter() - started)}


def rows(rounds: int, run: Path) -> Iterator[Row]:
    """Our ancestral sampler against the library's defaults, and DDIM against DDIM."""
    alternatives = {f"ours {steps}": Alternative(ours, run, "ddpm", steps) for steps in AS_GOOD_AS_1000}
    # A minute or more for each round of 1,000 evaluations: there the first ones count for nothing.
    found = in_turn({**alternatives, "default": Alternative(library, run, None)}, rounds, warm_up=False)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    for steps, judged in AS_GOOD_AS_1000.items():
        what = f"sampling, `ddpm` {steps} (as good by {judged})"
        yield ratio(what, "images/s", speeds[f"ours {steps}"], speeds["default"], "`sample()`, 1,000", 60)
    found = in_turn({"ours": Alternative(ours, run, "ddim", 50), "ddim": Alternative(library, run, 50)}, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    yield ratio("sampling, `ddim` 50", "images/s", speeds["ours"], speeds["ddim"], "library's DDIM 50", 1.5)


def planned(run: Path, num_samples: int, sampler: Any, steps: int) -> "SampleSet":
    """A set of samples of the run's newest weights, of which nothing is written yet."""
    from diffusion.settings import SamplerSettings
    from jobs import samples
    from jobs.run_folder import RunFolder

    return samples.plan(
        RunFolder(run),
        num_samples=num_samples,
        seed=0,
        sampler=SamplerSettings(sampler=sampler, steps=steps),
        weights="ema",
        checkpoint=None,
        name="benchmark",
        say=print,
    )


def _load(samples: "SampleSet") -> "tuple[Experiment, DiffusionModel]":
    """What draws it."""
    import torch

    from jobs.run_folder import RunFolder
    from jobs.sample import load_model

    return load_model(RunFolder(samples.run), samples.settings, torch.device("cpu"))
