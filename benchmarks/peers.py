"""What a user would train with instead, measured in rounds, and what all of them train.

The library's own `Trainer`, a plain Accelerate loop over tensors in memory, and the loop of diffusers' unconditional
example with its settings (transforms of PIL images, EMA, AdamW, cosine).
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Measurements

if TYPE_CHECKING:
    from denoising_diffusion_pytorch import GaussianDiffusion
    from torch import Tensor

    from diffusion.images.experiment import ImageExperiment
    from jobs.runtime.numerics import Kind, Precision

LR = 1e-4
WORKERS = 4
"""Processes in which `Trainer` loads images."""


@dataclass(frozen=True)
class Case:
    """What all of them train."""

    device: "Kind"
    dim: int
    batch_size: int
    pngs: Path
    """A folder with the digits as PNG files, for `Trainer`."""

    @property
    def label(self) -> str:
        return "" if self.device == "cpu" else f", batch {self.batch_size}"


def rounds_of(case: Case, steps: int, step: "Callable[[], Tensor | float]") -> Measurements:
    """Rounds of so many calls of `step`, which returns its loss."""
    return timed(case, steps, lambda n: [step() for _ in range(n)])


def timed(case: Case, steps: int, run: "Callable[[int], Sequence[Tensor | float]]") -> Measurements:
    """Rounds of so many steps; `run` takes a number of them and returns their losses."""
    from benchmarks.device import peak_memory_mb, wait

    while True:
        if case.device == "cuda":
            run(1)  # takes the memory again that the round before has given back
        wait(case.device)
        started = time.perf_counter()
        losses = run(steps)
        wait(case.device)
        seconds = time.perf_counter() - started
        speed = {"images_per_s": steps * case.batch_size / seconds, "loss": sum(map(float, losses)) / steps}
        # Ours lie on the device, and what a round leaves there is to be given back.
        del losses
        yield {**speed, **peak_memory_mb(case.device)}


def plain_loop(case: Case, steps: int, precision: "Precision") -> Measurements:
    """What the documentation of Accelerate shows, over tensors in memory."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = _accelerator(case, precision)
    model = library_model(case.dim)
    # The betas of the library's `Trainer` and of ours, because the losses are shown side by side.
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.99))
    images = experiment(case.dim).images.float() / 255
    loader = DataLoader(TensorDataset(images), batch_size=case.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = _endless(loader)

    def step() -> float:
        (batch,) = next(batches)
        loss = model(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return rounds_of(case, steps, step)


def _accelerator(case: Case, precision: "Precision") -> Any:
    from accelerate import Accelerator

    from benchmarks.device import hide_gpus

    hide_gpus(case.device)
    return Accelerator(cpu=case.device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def diffusers_example(case: Case, steps: int, precision: "Precision") -> Measurements:
    """The loop of diffusers' examples/unconditional_image_generation, around the same network."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms

    prepare = transforms.Compose(
        [transforms.Resize(28), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )
    pictures = [Image.fromarray(image) for image in experiment(case.dim).images[:, 0].numpy()]
    accelerator = _accelerator(case, precision)
    model = library_model(case.dim).model
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    average.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=1_000_000)
    loader: Any = DataLoader(
        pictures,  # type: ignore[arg-type]
        batch_size=case.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda images: torch.stack([prepare(image) for image in images]),
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    schedule: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    batches = _endless(loader)

    def step() -> float:
        clean = next(batches)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        loss = torch.nn.functional.mse_loss(model(schedule.add_noise(clean, noise, t), t), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        return loss.item()

    return rounds_of(case, steps, step)


def trainer(case: Case, steps: int, precision: "Precision") -> Measurements:
    """denoising-diffusion-pytorch's own `Trainer` on a folder of PNG files, as its README has it, with few loaders."""
    from denoising_diffusion_pytorch import Trainer
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

    from benchmarks.device import hide_gpus

    hide_gpus(case.device)
    # One for each core is its way, but to fork a process that uses a GPU may take seconds, and these few keep up.
    library.cpu_count = lambda: min(WORKERS, os.cpu_count() or 1)
    peer: Any = Trainer(
        library_model(case.dim),
        str(case.pngs),
        train_batch_size=case.batch_size,
        augment_horizontal_flip=False,  # digits
        train_lr=LR,
        save_and_sample_every=10**9,
        calculate_fid=False,
        results_folder=str(case.pngs / "results"),
        amp=precision == "bf16",
        mixed_precision_type="bf16",
    )
    losses: list[float] = []
    # `Trainer` shows its loss only in the progress bar. It calls item() at each step itself, so this costs no waiting.
    peer.model.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))

    def run(steps: int) -> list[float]:
        # `train` goes on from its own step, and ends at this one.
        peer.train_num_steps = peer.step + steps
        losses.clear()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            peer.train()
        return losses

    return timed(case, steps, run)


@contextlib.contextmanager
def png_folder(count: int = 60_000) -> Iterator[Path]:
    """A folder with training digits as PNG files, as the library's `Trainer` wants them."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        for i, image in enumerate(experiment(32).images[:count, 0].numpy()):
            Image.fromarray(image).save(Path(name) / f"{i}.png")
        yield Path(name)


def experiment(dim: int) -> "ImageExperiment":
    """MNIST with the U-Net that all of them train."""
    from diffusion.images.experiment import ImageExperiment
    from diffusion.settings import UnetSettings
    from jobs.experiments.table import EXPERIMENTS

    preset = EXPERIMENTS["mnist"].preset
    preset.data.prepare(print)
    found = replace(preset, model=UnetSettings(dim=dim)).build()
    assert isinstance(found, ImageExperiment)
    return found


def library_model(dim: int) -> "GaussianDiffusion":
    """The same network and process, built from the library alone."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(0)
    unet = Unet(dim, dim_mults=(1, 2, 4), channels=1)
    return GaussianDiffusion(unet, image_size=28, objective="pred_noise", beta_schedule="linear")
