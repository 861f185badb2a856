"""Time to quality: how soon mnist-small reaches the Frechet distance that the library's recipe reaches in an hour.

The recipe is the `Trainer` of denoising-diffusion-pytorch's README, two batches of 32 for an update, learning rate
8e-5, moving average 0.995, its default process and loss, around a U-Net of dim 32 with mults (1, 2, 4), which suits
digits. What would only cost it time or quality is left out: flipped digits, pictures and checkpoints while it trains,
and amp, which is for GPUs.
Its hour is counted in steps, at the pace that it has alone on the machine; they are then taken with our layers, in
fp32, which compute the same to rounding in less time. What it has reached is kept, not to be computed twice.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.commands import command
from benchmarks.comparison import Alternative, Measurements, Row, machine
from benchmarks.peers import png_folder
from diffusion.problems.mnist import MnistProblem

if TYPE_CHECKING:
    import numpy as np
    from denoising_diffusion_pytorch import GaussianDiffusion
    from numpy.typing import NDArray

LIBRARY_S = 3600.0
PACE_STEPS = 50
"""Steps over which its pace is taken, after ten that warm up."""
AT_LEAST = 8
OUR_STEPS = (250, 500, 750, 1000, 1250)
"""Lengths of our trainings, each a run of its own; the first that is as good counts, if the next is as good, too."""
SAMPLES, SAMPLER_STEPS, BATCH_SIZE = 2000, 50, 64
"""Both are sampled in the same way: ancestral sampling of 50 steps, which the library calls DDIM with eta 1."""


def library(seconds: float, folder: Path) -> Measurements:
    """Trains the recipe for `seconds`, then draws; leaves samples.npy and library.json in the folder."""
    import numpy as np
    import torch

    from diffusion.images.unet import with_fast_layers
    from jobs.runtime.malloc import keep_freed_memory

    with png_folder() as digits:
        pace = _Trainer(recipe(), digits)
        pace.train(10)
        steps = round(seconds * PACE_STEPS / pace.train(PACE_STEPS))
        # After the pace has been taken: who follows the recipe has neither this nor our layers.
        keep_freed_memory()
        model = recipe()
        with_fast_layers(model.model).to(memory_format=torch.channels_last)
        trainer = _Trainer(model, digits)
        trainer.train(steps)
    np.save(folder / "samples.npy", draw(trainer.average))
    (folder / "library.json").write_text(json.dumps({"steps": steps, "machine": machine()}))
    yield {"steps": steps}


class _Trainer:
    """The library's `Trainer` with the settings of its recipe."""

    def __init__(self, model: "GaussianDiffusion", digits: Path) -> None:
        from denoising_diffusion_pytorch import Trainer

        self._trainer: Any = Trainer(
            model,
            str(digits),
            train_batch_size=32,
            gradient_accumulate_every=2,
            augment_horizontal_flip=False,
            train_lr=8e-5,
            ema_decay=0.995,
            save_and_sample_every=10**9,
            calculate_fid=False,
            results_folder=str(digits / "results"),
        )

    @property
    def average(self) -> "GaussianDiffusion":
        """The model with the moving average of the weights."""
        return self._trainer.ema.ema_model

    def train(self, steps: int) -> float:
        """Takes so many steps more; returns the seconds that they took."""
        self._trainer.train_num_steps, started = self._trainer.step + steps, time.perf_counter()
        with _no_progress_bars():
            self._trainer.train()
        return time.perf_counter() - started


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def recipe() -> "GaussianDiffusion":
    """The library's network and process."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(0)
    unet = Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
    return GaussianDiffusion(unet, image_size=28, sampling_timesteps=SAMPLER_STEPS, ddim_sampling_eta=1.0)


def draw(model: "GaussianDiffusion") -> "NDArray[np.uint8]":
    """Samples of the recipe, uint8 [SAMPLES, 28, 28, 1]."""
    import torch

    torch.manual_seed(0)
    with _no_progress_bars():
        batches = [model.sample(batch_size=BATCH_SIZE) for _ in range(0, SAMPLES, BATCH_SIZE)]
    return (torch.cat(batches)[:SAMPLES] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def frechet(samples: "NDArray[np.uint8]", experiment: str = "mnist-small", *, real: bool = False) -> float:
    """The distance that `evaluate` prints for these samples, uint8 [n, 28, 28, 1], or for as many real digits."""
    from diffusion.statistics.evaluator import Drawn, unpack
    from jobs.experiments.table import EXPERIMENTS

    entry = EXPERIMENTS[experiment]
    evaluator = entry.preset.evaluator(Drawn(samples, None, entry.sampler))
    return unpack(evaluator.units()[f"features-real-{len(samples)}" if real else "features"].compute()["frechet"]).value


def ours(steps: int, folder: Path) -> tuple[float, float]:
    """The seconds of the whole command that trains that long, and the distance that its run has reached."""
    import numpy as np

    run = f"mnist-small/of-{steps}"
    where = ("--device", "cpu", "--cluster", "local")
    trained = ("train", "mnist-small", "--name", f"of-{steps}", "--train.steps", steps, *where)
    digits = str(Path(MnistProblem().root).absolute())
    seconds = command(*trained, cwd=folder, MNIST_ROOT=digits)
    sampled = ("--sampler", "ddpm", "--steps", SAMPLER_STEPS, "--num-samples", SAMPLES, "--name", "a")
    command("sample", run, *sampled, *where, cwd=folder, MNIST_ROOT=digits)
    with np.load(folder / "runs" / run / "samples" / "a" / "samples.npz") as arrays:
        return seconds, frechet(arrays["arr_0"])


def rows(kept: Path) -> Iterator[Row]:
    """One comparison, of one seed; the library's part is taken from the folder `kept` if it is there."""
    import numpy as np

    if not (kept / "library.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        alternative = Alternative(library, LIBRARY_S, kept)
        try:
            alternative.measure()
        finally:
            alternative.close()
    peer = json.loads((kept / "library.json").read_text())
    if peer["machine"] != machine():
        raise RuntimeError(f"{kept} was made on another machine: remove it to train the library's recipe on this one")
    goal = frechet(np.load(kept / "samples.npy"))
    good: tuple[int, float, float] | None = None
    with tempfile.TemporaryDirectory() as name:
        for steps in OUR_STEPS:
            seconds, reached = ours(steps, Path(name))
            print(f"{steps} steps: {seconds:.0f} s, {reached:.2f}, where the library has {goal:.2f}", file=sys.stderr)
            if reached <= goal and good is not None:
                break
            good = (steps, seconds, reached) if reached <= goal else None
        else:
            raise RuntimeError(f"{OUR_STEPS[-1]} steps are not enough to be as good as the library's recipe twice")
    steps, seconds, reached = good
    value = LIBRARY_S / seconds
    yield Row(
        f"training of `mnist-small` to the library's Frechet distance, {steps} steps",
        f"{seconds:.0f} s, {reached:.2f}",
        f"its recipe, {peer['steps']:,} steps: {LIBRARY_S:.0f} s, {goal:.2f}",
        value,
        value,
        value,
        f">= {AT_LEAST}",
        value >= AT_LEAST,
    )
