"""Sampling speed of a trained run of digits: our samplers against the library's, on the same network and sub-batches.

`sample()` of the library with its defaults takes 1,000 ancestral steps; which of our settings are as good is in the
table of docs/evaluation.md, from `evaluate --all`.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Alternative, Measurements, Row, in_turn, ratio

if TYPE_CHECKING:
    from diffusion.process.model import DiffusionModel, Experiment
    from jobs.runtime.numerics import Kind
    from jobs.sample.sample_set import SampleSet

AS_GOOD_AS_1000 = {20: "Frechet distance", 50: "every metric"}
"""These numbers of ancestral steps are as good as 1,000, by which measure: 2,000 digits of `mnist-small` lie within the
interval of the 1,000 steps' (docs/evaluation.md)."""


def ours(run: Path, device: "Kind", sampler: str, steps: int, compiled: bool = False) -> Measurements:
    """Sub-batches as the sampling job draws them; what it does before the first one is not counted."""
    import torch

    from benchmarks.device import wait
    from jobs.runtime.malloc import keep_freed_memory
    from jobs.runtime.numerics import resolve_precision, set_numerics
    from jobs.sample.draw import draw, evaluation

    keep_freed_memory()  # as each of our jobs does
    samples = planned(run, sampler, steps)
    experiment, model = _load(samples, device)
    precision, first, n = resolve_precision("auto", device), 0, samples.settings.sub_batch_size
    set_numerics(precision)
    predict = evaluation(model, None, compiled, device, print)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        if compiled or device == "cuda":
            draw(predict, model.alphas_cumprod, experiment, samples.settings, first, first + n)  # compiles, captures it
        while True:
            wait(device)
            started = time.perf_counter()
            x0 = draw(predict, model.alphas_cumprod, experiment, samples.settings, first, first + n)
            experiment.to_array(x0)  # in the host's memory, so the device has finished
            yield {"images_per_s": n / (time.perf_counter() - started)}
            first += n


def library(run: Path, device: "Kind", steps: int | None) -> Measurements:
    """`GaussianDiffusion.sample` around the library's U-Net; `steps` below 1,000 is its DDIM, None its default."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from torch import Tensor, nn

    from benchmarks.device import wait
    from diffusion.images.experiment import ImageExperiment, UnetModel, library_unet

    # For the weights and the size of a sub-batch; how it is drawn is the library's.
    samples = planned(run, "ddim", 50)
    experiment, model = _load(samples, device)
    assert isinstance(experiment, ImageExperiment) and isinstance(model, UnetModel)
    unet, n = library_unet(experiment.model_settings, image_channels=1).eval(), samples.settings.sub_batch_size
    unet.load_state_dict(model.network.state_dict())
    model.network = unet.to(device)

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
        Network(),
        image_size=28,
        timesteps=len(model.alphas_cumprod),
        objective="pred_noise",
        beta_schedule="linear",
        sampling_timesteps=steps,
    ).to(device)
    while True:
        wait(device)
        started = time.perf_counter()
        peer.sample(batch_size=n)
        wait(device)
        yield {"images_per_s": n / (time.perf_counter() - started)}


def rows(rounds: int, run: Path, device: "Kind", small: bool) -> Iterator[Row]:
    """Our ancestral sampler against the library's defaults, and DDIM against DDIM."""
    alternatives = {f"ours {steps}": Alternative(ours, run, device, "ddpm", steps) for steps in AS_GOOD_AS_1000}
    # A round of 1,000 evaluations takes most of a minute: its first ones warm up, and on a GPU's time one is enough.
    alternatives["default"] = Alternative(library, run, device, None)
    found = in_turn(alternatives, 1 if device == "cuda" else rounds, warm_up=False)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    targets = device == "cpu" and not small
    for steps, judged in AS_GOOD_AS_1000.items():
        what = f"sampling, `ddpm` {steps} (as good by {judged})"
        at_least = 60 if targets else None
        yield ratio(what, speeds[f"ours {steps}"], speeds["default"], "`sample()`, all timesteps", at_least)
    pair = {"ours": Alternative(ours, run, device, "ddim", 50), "ddim": Alternative(library, run, device, 50)}
    found = in_turn(pair, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    yield ratio("sampling, `ddim` 50", speeds["ours"], speeds["ddim"], "library's DDIM 50", 1.5 if targets else None)
    pair = {name: Alternative(ours, run, device, "ddpm", 50, name == "--compile") for name in ("--compile", "without")}
    found = in_turn(pair, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    yield ratio("sampling, `ddpm` 50, `--compile`", speeds["--compile"], speeds["without"], "without it", None)


def planned(run: Path, sampler: Any, steps: int, num_samples: int = 64) -> "SampleSet":
    """A set of samples of the run's newest weights, of which nothing is written yet."""
    from diffusion.settings import SamplerSettings
    from jobs.sample import sample_set
    from jobs.storage.run_folder import RunFolder

    asked = SamplerSettings(sampler=sampler, steps=steps)
    settings = sample_set.choose(
        RunFolder(run), seed=0, sampler=asked, weights="ema", checkpoint=None, autoguided=1, say=print
    )
    return sample_set.plan(RunFolder(run), settings, num_samples, "benchmark")


def _load(samples: "SampleSet", device: "Kind") -> "tuple[Experiment, DiffusionModel]":
    """What draws it."""
    import torch

    from jobs.sample.draw import load_model
    from jobs.storage.run_folder import RunFolder

    return load_model(RunFolder(samples.run), samples.settings, torch.device(device))
