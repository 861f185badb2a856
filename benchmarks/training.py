"""Training speed on one U-Net (dim 32, mults (1, 2, 4), 28x28), global batch 128: ours against what a user would run.

All begin with the same weights and see shuffled digits; the loss that each reports is the mean over its last round,
after the same number of images. Peers: the library's own `Trainer`, a plain Accelerate loop over tensors in memory, and
the loop of diffusers' unconditional example with its settings (transforms of PIL images, EMA, AdamW, cosine).
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.comparison import Alternative, Measurements, Row, in_turn, limit, ratio

if TYPE_CHECKING:
    from denoising_diffusion_pytorch import GaussianDiffusion

    from diffusion.mnist import Mnist

BATCH_SIZE = 128
LR = 1e-4


def ours(steps: int, precision: Literal["auto", "fp32"] = "auto", compile: bool = False) -> Measurements:
    """This project's update, with its data, noise, moving average, clipping and all."""
    from jobs.memory import keep_freed_memory
    from jobs.numerics import resolve_precision
    from jobs.settings import TrainSettings
    from jobs.training import Training
    from jobs.world import start

    keep_freed_memory()  # as each of our jobs does
    experiment = _experiment()
    settings = TrainSettings(steps=1_000_000, batch_size=BATCH_SIZE, lr=LR, warmup_steps=1, beta2=0.99, compile=compile)
    training = Training(experiment, settings, start(1, "cpu", resolve_precision(precision, "cpu")))
    training.raw.network.load_state_dict(_library_model().model.state_dict())
    compile_s = training.compile() if compile else 0.0
    while True:
        started, losses = time.perf_counter(), []
        for _ in range(steps):
            losses.append(float(training.update().loss))
        seconds = time.perf_counter() - started
        yield {"images_per_s": steps * BATCH_SIZE / seconds, "loss": sum(losses) / steps, "compile_s": compile_s}


def plain_loop(steps: int) -> Measurements:
    """What the documentation of Accelerate shows, in fp32, over tensors in memory."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(cpu=True)
    model = _library_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.99))
    images = _experiment().images.float() / 255
    loader = DataLoader(TensorDataset(images), batch_size=BATCH_SIZE, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    while True:
        started, losses = time.perf_counter(), []
        for _ in range(steps):
            (batch,) = next(batches)
            loss = model(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        yield {"images_per_s": steps * BATCH_SIZE / (time.perf_counter() - started), "loss": sum(losses) / steps}


def diffusers_example(steps: int) -> Measurements:
    """The loop of diffusers' examples/unconditional_image_generation, around the same network, in fp32."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms

    prepare = transforms.Compose(
        [transforms.Resize(28), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )
    pictures = [Image.fromarray(image) for image in _experiment().images[:, 0].numpy()]
    accelerator = Accelerator(cpu=True)
    model = _library_model().model
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=1_000_000)
    loader: Any = DataLoader(
        pictures,  # type: ignore[arg-type]
        batch_size=BATCH_SIZE,
        shuffle=True,
        collate_fn=lambda images: torch.stack([prepare(image) for image in images]),
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    schedule: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    batches = iter(loader)
    while True:
        started, losses = time.perf_counter(), []
        for _ in range(steps):
            clean = next(batches)
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            loss = torch.nn.functional.mse_loss(model(schedule.add_noise(clean, noise, t), t), noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            losses.append(loss.item())
        yield {"images_per_s": steps * BATCH_SIZE / (time.perf_counter() - started), "loss": sum(losses) / steps}


def trainer(steps: int) -> Measurements:
    """denoising-diffusion-pytorch's own `Trainer` on a folder of PNG files, as its README has it."""
    from denoising_diffusion_pytorch import Trainer

    with png_folder() as folder:
        peer: Any = Trainer(
            _library_model(),
            str(folder),
            train_batch_size=BATCH_SIZE,
            augment_horizontal_flip=False,  # digits
            train_lr=LR,
            save_and_sample_every=10**9,
            calculate_fid=False,
            results_folder=str(folder / "results"),
        )
        losses: list[float] = []
        peer.model.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))
        while True:
            peer.train_num_steps = peer.step + steps
            losses.clear()
            started = time.perf_counter()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                peer.train()
            seconds = time.perf_counter() - started
            yield {"images_per_s": steps * BATCH_SIZE / seconds, "loss": sum(losses) / steps}


@contextlib.contextmanager
def png_folder() -> Iterator[Path]:
    """A folder with the training digits as PNG files, as the library's `Trainer` wants them."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        for i, image in enumerate(_experiment().images[:, 0].numpy()):
            Image.fromarray(image).save(Path(name) / f"{i}.png")
        yield Path(name)


def rows(rounds: int, steps: int) -> Iterator[Row]:
    """The comparisons; each round takes `steps` steps of each."""
    alternatives = {
        "ours": Alternative(ours, steps),
        "fp32": Alternative(ours, steps, "fp32"),
        "compiled": Alternative(ours, steps, "auto", True),
        "trainer": Alternative(trainer, steps),
        "loop": Alternative(plain_loop, steps),
        "diffusers": Alternative(diffusers_example, steps),
    }
    found = in_turn(alternatives, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    losses = {name: f"loss {measured[-1]['loss']:.3f}" for name, measured in found.items()}
    peers = {"trainer": ("`Trainer`", 2.5), "loop": ("Accelerate loop", 1.6), "diffusers": ("diffusers' example", 1.6)}
    for name, what in (("ours", "training"), ("fp32", "training in fp32")):
        for peer, (title, at_least) in peers.items():
            shown, target = f"{title} ({losses[peer]})", at_least if name == "ours" else None
            yield ratio(f"{what}, {losses[name]}", "images/s", speeds[name], speeds[peer], shown, target)
    compiled = f"training, `--train.compile`, {losses['compiled']}"
    yield ratio(compiled, "images/s", speeds["compiled"], speeds["ours"], f"without it ({losses['ours']})", None)
    yield limit("compiling, at each start", "s", [found["compiled"][0]["compile_s"]], None)


def _experiment() -> "Mnist":
    """MNIST with the U-Net that all three train."""
    from diffusion.settings import UnetSettings
    from jobs.experiments import EXPERIMENTS, MnistConfig

    preset = EXPERIMENTS["mnist"].preset
    assert isinstance(preset, MnistConfig)
    preset.prepare(print)
    return MnistConfig(data=preset.data, model=UnetSettings(dim=32), train=preset.train).build()


def _library_model() -> "GaussianDiffusion":
    """The same network and process, built from the library alone."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(0)
    unet = Unet(32, dim_mults=(1, 2, 4), channels=1)
    return GaussianDiffusion(unet, image_size=28, objective="pred_noise", beta_schedule="linear")
