"""Figures of the 1D experiment, which show everything beside its exact answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from diffusion.figures.style import EXACT, MODEL, new_figure, save
from diffusion.gaussian1d.mixture import Mixture
from diffusion.process.randomness import Stream, normal, uniform
from diffusion.process.samplers import Denoiser, Predict, ddpm

_HISTOGRAM: dict[str, Any] = {"histtype": "stepfilled", "color": MODEL, "alpha": 0.5}
"""How histograms look: one shape each, as a bar for each bin takes a third more of the time that a figure takes."""


def forward_process(mixture: Mixture, abar: Tensor, path: Path) -> None:
    """Histograms of x_t at five timesteps against the exact marginals: data become noise."""
    n, times = 20_000, np.linspace(0, len(abar) - 1, 5).round().astype(int)
    x0 = mixture.sample(
        torch.from_numpy(uniform(0, Stream.FIGURE, 0, 0, n)), torch.from_numpy(normal(0, Stream.FIGURE, 1, 0, n))
    )
    eps = torch.from_numpy(normal(0, Stream.FIGURE, 2, 0, n))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(times), sharex=True, sharey=True)
    low, high = _range(mixture)
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    for axes, t in zip(all_axes, times, strict=True):
        a = float(abar[t])
        xt = a**0.5 * x0 + (1 - a) ** 0.5 * eps
        _histogram(axes, xt.numpy(), 80, (low, high), label="forward process")
        axes.plot(grid, mixture.at(a).pdf(grid), color=EXACT, linewidth=2, label="exact density")
        axes.set(title=f"t = {t}", xlabel="$x_t$", xlim=(low, high))
    all_axes[0].set_ylabel("density")
    figure.suptitle("Forward process: the mixture becomes noise")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def reverse_process(predict: Predict, mixture: Mixture, abar: Tensor, path: Path) -> None:
    """Trajectories of the ancestral sampler from noise to data, between the exact densities of both ends."""
    steps, kept, shown = min(len(abar), 250), 2000, 60
    shape = (kept, 1)
    xt = torch.from_numpy(normal(0, Stream.FIGURE, 3, 0, kept, (1,)))

    def noise(k: int) -> Tensor:
        # Seed 1, because with seed 0 the noise of step 3 would be the start once more.
        return torch.from_numpy(normal(1, Stream.FIGURE, k, 0, kept, shape[1:]))

    with torch.inference_mode():
        path_x = [xt, *ddpm(Denoiser(predict, abar), xt, steps=steps, noise=noise)]
    x = torch.stack(path_x)[:, :, 0].numpy()  # [steps + 1, kept]
    low, high = _range(mixture)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    start, middle, end = figure.subplots(1, 3, sharey=True, width_ratios=[1, 5, 1])
    t = np.linspace(len(abar), 0, len(x))
    middle.plot(t, x[:, :shown], color=MODEL, alpha=0.45, linewidth=0.8)
    middle.set(title="Reverse process: noise becomes data", xlabel="timestep t", xlim=(len(abar), 0), ylim=(low, high))
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    for axes, values, density, title in (
        (start, x[0], mixture.at(float(abar[-1])).pdf(grid), "noise $x_T$"),
        (end, x[-1], mixture.pdf(grid), "data $x_0$"),
    ):
        _histogram(axes, values, 60, (low, high), orientation="horizontal", label="model")
        axes.plot(density, grid, color=EXACT, linewidth=2, label="exact")
        axes.set(title=title, xlabel="density")
    start.set_ylabel("$x$")
    start.invert_xaxis()
    figure.legend(*end.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def samples(mixture: Mixture, x: NDArray[Any], path: Path) -> None:
    """A histogram of samples x [n] against the exact density."""
    low, high = _range(mixture)
    grid = torch.linspace(low, high, 600, dtype=torch.float64)
    figure, axes = new_figure()
    # About the square root of n, so that chance in a bin stays small beside its height.
    bins = min(120, max(10, round(len(x) ** 0.5)))
    _histogram(axes, x, bins, (low, high), label=f"{len(x):,} samples of the model")
    axes.plot(grid, mixture.pdf(grid), color=EXACT, linewidth=2, label="exact density")
    axes.set(title="Samples of the model against the exact mixture", xlabel="$x_0$", ylabel="density", xlim=(low, high))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def guidance(components: list[Mixture], drawn: list[list[Tensor]], scales: Sequence[float], path: Path) -> None:
    """Samples of each class (rows) at growing guidance (columns) against the exact density of the class."""
    figure = Figure(figsize=(2.6 * len(scales), 2.1 * len(components) + 0.9), layout="constrained")
    all_axes = figure.subplots(len(components), len(scales), sharex=True, sharey="row", squeeze=False)
    low, high = min(_range(c)[0] for c in components), max(_range(c)[1] for c in components)
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    for row, (component, by_scale) in enumerate(zip(components, drawn, strict=True)):
        for axes, x, scale in zip(all_axes[row], by_scale, scales, strict=True):
            _histogram(axes, x.numpy(), 80, (low, high), label="samples")
            axes.plot(grid, component.pdf(grid), color=EXACT, linewidth=2, label="exact density of the class")
            axes.set_xlim(low, high)
            if row == 0:
                axes.set_title(f"guidance {scale:g}")
        all_axes[row, 0].set_ylabel(f"class {row}")
    figure.suptitle("Guidance: 0 is without classes, 1 the class as it is, more exaggerates it")
    figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def excess_loss(excess: Tensor, floor: Tensor, path: Path) -> None:
    """Loss above the exact optimum by timestep, beside the optimum, both [T]."""
    figure, axes = new_figure()
    axes.plot(floor, color=EXACT, linewidth=2, linestyle="--", label=f"exact optimum $L^*_t$ (mean {floor.mean():.4f})")
    axes.plot(excess, color=MODEL, linewidth=2, label=f"excess of the model (mean {excess.mean():.5f})")
    axes.set(
        title="Where the model could still improve",
        xlabel="timestep t",
        ylabel="mean squared error of the noise",
        yscale="log",
    )
    axes.legend(frameon=False)
    save(figure, path)


def _histogram(axes: Axes, x: NDArray[Any], bins: int, inside: tuple[float, float], **more: Any) -> None:
    """Draws the density of x [n], flat at 0 if nothing lies inside: a bad model, or too few steps."""
    low, high = inside
    has_some = bool(((low <= x) & (x <= high)).any())  # else numpy would divide by their number, 0
    axes.hist(x, bins=bins, range=inside, density=has_some, **_HISTOGRAM, **more)


def _range(mixture: Mixture) -> tuple[float, float]:
    """Returns the range in which the mixture, and the noise that it becomes, have nearly all their mass."""
    low = min(float((mixture.means - 4 * mixture.stds).min()), -3.5)
    return low, max(float((mixture.means + 4 * mixture.stds).max()), 3.5)
