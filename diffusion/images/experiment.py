"""Experiments on images: denoising-diffusion-pytorch's U-Net and Gaussian diffusion."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch import classifier_free_guidance as with_classes
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.images.pixels import Images, scaled, unscaled
from diffusion.images.unet import with_fast_layers
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.randomness import Stream, permutation
from diffusion.process.schedules import alphas_cumprod_at
from diffusion.process.transfer import sent
from diffusion.settings import ClassSettings, DiffusionSettings, UnetSettings

HELD_OUT = 512
"""Test images that a training's held-out loss is the mean of: those whose bits per dimension `evaluate` takes.

Fewer of them come several times, at other timesteps and with other noise.
"""


def library_unet(settings: UnetSettings, image_channels: int, num_classes: int = 0) -> Unet | with_classes.Unet:
    """Builds the library's network as it is."""
    channels = image_channels * settings.patch_size**2
    if num_classes:
        return with_classes.Unet(settings.dim, num_classes, dim_mults=settings.dim_mults, channels=channels)
    return Unet(settings.dim, dim_mults=settings.dim_mults, channels=channels, attn_heads=settings.attn_heads or 4)


class UnetModel(DiffusionModel):
    """The library's `Unet` under the library's process, with space-to-depth and a skip around it if asked for."""

    def __init__(self, unet: nn.Module, diffusion: nn.Module, settings: UnetSettings, num_classes: int = 0) -> None:
        assert isinstance(diffusion.alphas_cumprod, Tensor)
        super().__init__(unet, diffusion.alphas_cumprod, num_classes)
        self.patch_size, self.noise_skip = settings.patch_size, settings.noise_skip

    def predict(self, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        patches = F.pixel_unshuffle(
            xt, self.patch_size
        )  # [batch, channels * patch_size^2, height / patch_size, width / patch_size]
        out = F.pixel_shuffle(self._out(patches, t, *self.told(xt, classes)), self.patch_size)
        if not self.noise_skip:
            return out
        # eps = b x_t + a v, with v of unit size at every t (Salimans & Ho 2022, appendix D).
        abar = alphas_cumprod_at(self.alphas_cumprod, t).float().view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * xt + abar.sqrt() * out.float()

    def _out(self, patches: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        if classes is None:
            out: Tensor = self.network(patches, t)
        else:  # the library's network takes classes that exist, and a mask of those that it is told
            known = classes.clamp(max=self.num_classes - 1)
            out = self.network(patches, t, known, cond_keep_mask=classes < self.num_classes)
        return out


class ImageExperiment(Experiment):
    """Images scaled to [-1, 1], [n, channels, height, width]."""

    clip = (-1.0, 1.0)

    def __init__(
        self,
        load: Callable[[Literal["train", "test"]], tuple[Images, NDArray[np.uint8]]],
        shape: tuple[int, int, int],
        noun: str,
        model: UnetSettings,
        diffusion: DiffusionSettings,
        num_classes: int = 0,
    ) -> None:
        """`load` returns images [n, height, width, channels] and their classes [n], `shape` is that of one image.

        `noun` is what figures call the images. A network that is told classes is told `num_classes` of them.
        """
        self.load = load
        if isinstance(model, ClassSettings):
            self.num_classes, self.class_dropout = num_classes, model.class_dropout
        height, width, channels = shape
        self.sample_shape = (channels, height, width)
        self.noun = noun
        self.model_settings = model
        self.diffusion_settings = diffusion
        self._classes = np.empty(0, dtype=np.int64)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @cached_property
    def images(self) -> Tensor:
        """uint8 [n, channels, height, width]; loaded when training first asks for it, sampling does not."""
        images, classes = self.load("train")
        self._classes = classes.astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    def classes(self, seed: int, step: int, start: int, stop: int, batch_size: int) -> NDArray[np.int64]:
        indices = self._indices(seed, step, start, stop, batch_size)  # which loads the images, and their classes
        return self._classes[indices]

    def build_model(self) -> DiffusionModel:
        settings = self.model_settings
        channels, height, width = self.sample_shape
        unet = with_fast_layers(library_unet(settings, channels, self.num_classes))
        # Only its alphas_cumprod are used: losses and samplers are those that all experiments share.
        process = with_classes.GaussianDiffusion if self.num_classes else GaussianDiffusion
        diffusion = process(
            unet,
            image_size=(height // settings.patch_size, width // settings.patch_size),
            timesteps=self.diffusion_settings.timesteps,
            objective="pred_noise",
            beta_schedule=self.diffusion_settings.beta_schedule,
        )
        return UnetModel(unet, diffusion, settings, self.num_classes)

    def batch(self, seed: int, step: int, start: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        # The whole data set moves to the device once (MNIST: 47 MB); from then on a batch is an index there.
        if self.images.device != device:
            self.images = self.images.to(device)
        return scaled(self.images[sent(self._indices(seed, step, start, stop, batch_size), device)])

    def held_out(self) -> tuple[Tensor, ...]:
        images, classes = self.load("test")
        # The seed and the number with which images/evaluation.py draws test images, so that these are the same.
        chosen = np.resize(permutation(0, Stream.EVALUATION, 1, len(images)), HELD_OUT)
        x0 = scaled(torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).contiguous())
        if not self.num_classes:
            return (x0,)
        told = self.with_dropout(classes[chosen].astype(np.int64), 0, 0, 0)  # a training draws steps from 1 on
        return x0, torch.from_numpy(told)

    def to_array(self, x0: Tensor) -> NDArray[np.uint8]:
        """Returns uint8 [n, height, width, channels]."""
        return unscaled(x0)

    def draw_samples(self, samples: NDArray[Any], path: Path, classes: NDArray[np.int64] | None = None) -> None:
        from diffusion.images import figures  # here, because plotting libraries take a second to import

        figures.grid(samples, path, 0 if classes is None else len(np.unique(classes)))

    def report(self, model: DiffusionModel, folder: Path) -> list[str]:
        from diffusion.images import figures

        abar = model.alphas_cumprod.cpu()
        figures.forward_process(self.images[:6].cpu(), abar, self.noun, folder / "forward.png")
        figures.reverse_process(model, self, self.noun, 64, folder)
        if self.num_classes:
            figures.classes(model, self, self.noun, folder)
        return []

    def sketch(self, model: DiffusionModel, folder: Path) -> None:
        from diffusion.images import figures

        figures.sketch(model, self, self.noun, 16, folder)

    def _indices(self, seed: int, step: int, start: int, stop: int, batch_size: int) -> NDArray[np.int64]:
        """The images that are examples [start, stop) of the global batch of this step."""
        first = (step - 1) * batch_size
        return np.array([self._index(seed, first + i) for i in range(start, stop)])

    def _index(self, seed: int, position: int) -> int:
        """The image at this position of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.images))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(seed, Stream.EPOCH, epoch, len(self.images))
        return int(self._order[place])
