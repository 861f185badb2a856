"""Figures of experiments on images."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.figures.style import save
from diffusion.images.pixels import Images, scaled, unscaled
from diffusion.process.guidance import guided
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import Denoiser, Noise, Sampler, ddim, ddpm

GAP = 2
"""Pixels between images side by side."""


def tile(images: Images, columns: int) -> NDArray[np.uint8]:
    """Images side by side in rows, with grey gaps: [height, width], with colours [height, width, channels]."""
    n, height, width, channels = images.shape
    rows, cell_height, cell_width = -(-n // columns), height + GAP, width + GAP
    sheet = np.full((rows * cell_height + GAP, columns * cell_width + GAP, channels), 64, dtype=np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = row * cell_height + GAP, column * cell_width + GAP
        sheet[top : top + height, left : left + width] = image
    return without_single_channel(sheet)


def without_single_channel(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[height, width, channels] as plotting libraries take it: grey images have no axis of channels."""
    return image[..., 0] if image.shape[-1] == 1 else image


def grid(images: Images, path: Path, num_classes: int = 0) -> None:
    """The first 64 images in a square, three times enlarged, nothing around them.

    Where classes come in turn, a column holds one class, if there are enough of them for columns and images for a row.
    """
    columns = num_classes if 4 <= num_classes <= min(16, len(images)) else 0
    shown = images[: 64 // columns * columns] if columns else images[:64]
    Image.fromarray(_enlarged(tile(shown, columns or max(1, round(len(shown) ** 0.5))))).save(path)


def forward_process(images: Tensor, abar: Tensor, noun: str, path: Path) -> None:
    """Draws images uint8 [rows, channels, height, width] under growing noise."""
    times = [0, *np.linspace(len(abar) // 10, len(abar) - 1, 8).round().astype(int).tolist()]
    x0 = scaled(images)
    eps = torch.from_numpy(normal(0, Stream.FIGURE, 1, 0, len(x0), tuple(x0.shape[1:])))
    noisy = [x0 if t == 0 else abar[t] ** 0.5 * x0 + (1 - abar[t]) ** 0.5 * eps for t in times]
    columns = [unscaled(x) for x in noisy]
    _labelled(columns, [f"t = {t}" if t else "$x_0$" for t in times], f"Forward process: {noun} become noise", path)


def reverse_process(model: DiffusionModel, experiment: Experiment, noun: str, n: int, folder: Path) -> None:
    """n samples by the ancestral sampler: samples.png, denoising.png (a strip of steps) and denoising.gif."""
    steps = min(250, len(model.alphas_cumprod))

    def noise(k: int) -> Tensor:
        return torch.from_numpy(normal(0, Stream.FIGURE, k, 0, n, experiment.sample_shape))

    # The sampler asks for the noise of steps 0 to steps - 1, so the start has the next number.
    arrays = _path(ddpm, model, experiment, noise(steps), steps, noise)
    grid(arrays[-1], folder / "samples.png", model.num_classes)
    _denoising(arrays, 6, model, f"{noun} (DDPM, {steps} steps)", folder)
    frames = [
        Image.fromarray(_enlarged(tile(arrays[i][:36], columns=6))) for i in np.linspace(0, steps, 40).astype(int)
    ]
    durations = [80] * (len(frames) - 1) + [2000]  # milliseconds; the samples stay for two seconds
    frames[0].save(folder / "denoising.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def classes(model: DiffusionModel, experiment: Experiment, noun: str, folder: Path) -> None:
    """classes.png has a row of each class, all rows from the same noise; guidance.png a row for each scale."""
    number, columns, scales = model.num_classes, 8, (0.0, 1.0, 2.0, 4.0)
    noise = torch.from_numpy(normal(0, Stream.FIGURE, 0, 0, columns, experiment.sample_shape))
    rows = _of_classes(model, experiment, noise.repeat(number, 1, 1, 1), np.arange(number).repeat(columns), 1.0)
    Image.fromarray(_enlarged(tile(rows, columns))).save(folder / "classes.png")
    first = noise[:1].expand(number, -1, -1, -1)
    by_scale = [_of_classes(model, experiment, first, np.arange(number), scale) for scale in scales]
    _labelled(
        list(np.stack(by_scale, axis=1)),
        [f"{k}" for k in range(number)],
        f"{noun.capitalize()} of each class, from the same noise",
        folder / "guidance.png",
        ("guidance", [f"{scale:g}" for scale in scales]),
    )


def _of_classes(
    model: DiffusionModel, experiment: Experiment, xt: Tensor, classes: NDArray[np.int64], guidance: float
) -> Images:
    """Draws images of these classes [n] from noise xt by DDIM, which adds none and needs few steps."""
    abar = model.alphas_cumprod.double().cpu()
    predict = guided(model.predict_for, torch.from_numpy(classes), model.num_classes, guidance)
    with torch.inference_mode():
        *_, x0 = ddim(Denoiser(predict, abar, (-1, 1)), xt, steps=10, noise=torch.randn)
    images: Images = experiment.to_array(x0)
    return images


def sketch(model: DiffusionModel, experiment: Experiment, noun: str, n: int, folder: Path) -> None:
    """n samples by 25 steps of DDIM, always from the same noise: grid.png and denoising.png."""
    steps = min(25, len(model.alphas_cumprod))
    xt = torch.from_numpy(normal(0, Stream.FIGURE, 0, 0, n, experiment.sample_shape))
    # DDIM with eta 0 asks for no noise: torch.randn is there because all samplers have one signature.
    arrays = _path(ddim, model, experiment, xt, steps, torch.randn)
    grid(arrays[-1], folder / "grid.png", model.num_classes)
    _denoising(arrays, 4, model, f"{noun} (DDIM, {steps} steps)", folder)


def _path(
    sampler: Sampler, model: DiffusionModel, experiment: Experiment, xt: Tensor, steps: int, noise: Noise
) -> list[Images]:
    """The images that a sampler passes through from noise xt; where the model knows classes, they come in turn."""
    predict = model.predict_often()
    if n := model.num_classes:
        predict = guided(predict, torch.arange(len(xt)) % n, n, 1.0)
    denoiser = Denoiser(predict, model.alphas_cumprod.double().cpu(), (-1, 1))
    with torch.inference_mode():
        return [experiment.to_array(x) for x in (xt, *sampler(denoiser, xt, steps=steps, noise=noise))]


def _denoising(arrays: list[Images], rows: int, model: DiffusionModel, what: str, folder: Path) -> None:
    """denoising.png: nine of the steps that a sampler has passed through, from noise to the last one."""
    steps = len(arrays) - 1
    shown = np.linspace(0, steps, 9).round().astype(int)
    labels = [f"t = {round(len(model.alphas_cumprod) * (1 - i / steps))}" for i in shown]
    _labelled(
        [arrays[i][:rows] for i in shown], labels, f"Reverse process: noise becomes {what}", folder / "denoising.png"
    )


def real_beside_generated(real: Images, generated: Images, path: Path) -> None:
    """Draws 64 real and 64 generated images in two squares."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for axes, images, title in zip(figure.subplots(1, 2), (real, generated), ("real", "generated"), strict=True):
        axes.imshow(tile(images[:64], columns=8), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(title)
    save(figure, path)


def _labelled(
    columns: list[Images], labels: list[str], title: str, path: Path, row_labels: tuple[str, list[str]] | None = None
) -> None:
    """Columns of images, each with a label above; `row_labels` are a title for all rows and a label for each."""
    n, (rows, height, width, _) = len(columns), columns[0].shape
    figure = Figure(figsize=(1.1 * n, 1.1 * rows + 0.8), layout="constrained")
    # All in one picture: axes for each image take four times as long.
    axes = figure.subplots()
    axes.imshow(tile(np.concatenate(list(np.stack(columns, axis=1))), n), cmap="gray", vmin=0, vmax=255)
    axes.xaxis.tick_top()
    axes.set_xticks(_centres(n, width), labels)
    axes.set_yticks([])
    if row_labels is not None:
        what, each = row_labels
        axes.set_yticks(_centres(rows, height), each)
        axes.set_ylabel(what)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    figure.suptitle(title)
    save(figure, path)


def _centres(n: int, size: int) -> list[float]:
    """Where `tile` puts the middles of n images in a row or column; a pixel's own middle is a whole number."""
    return [GAP + (size - 1) / 2 + i * (size + GAP) for i in range(n)]


def _enlarged(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return sheet.repeat(3, axis=0).repeat(3, axis=1)
