"""Figures of evaluations of digits: real beside generated, classes, nearest training images."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffusion.figures.style import EXACT, MODEL, new_figure, save
from diffusion.images.pixels import Images


def classes(shares: NDArray[Any], real_shares: NDArray[Any], n: int, path: Path) -> None:
    """The share of each digit among n samples beside the real one, with what chance does to n real digits."""
    figure, axes = new_figure()
    digit = np.arange(10)
    axes.bar(digit, shares, color=MODEL, alpha=0.6, label=f"{n:,} samples, by the classifier")
    chance = 1.96 * np.sqrt(real_shares * (1 - real_shares) / n)
    axes.errorbar(digit, real_shares, chance, fmt="_", color=EXACT, markersize=18, capsize=6, linewidth=2)
    # For the legend alone, in which marks as wide as those above would not fit.
    axes.errorbar([], [], [], fmt="_", color=EXACT, capsize=6, label="real share, and 95% of chance")
    axes.set(title="Classes of the samples", xlabel="digit", ylabel="share", xticks=digit)
    axes.set_ylim(0, max(shares.max(), (real_shares + chance).max()) * 1.2)
    axes.legend(frameon=False, ncols=2, loc="upper center")
    save(figure, path)


def neighbours(
    samples: Images,
    labels: NDArray[np.integer],
    training: Images,
    distances: NDArray[Any],
    indices: NDArray[Any],
    path: Path,
) -> None:
    """Draws, of each digit, the sample nearest to a training image above its nearest training images."""
    by_distance = distances[:, 0].argsort(kind="stable")
    chosen = np.array([by_distance[labels[by_distance] == digit][0] for digit in np.unique(labels)])
    rows = [samples[chosen], *(training[indices[chosen, k]] for k in range(indices.shape[1]))]
    figure = Figure(figsize=(0.95 * len(chosen) + 1, 0.95 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), len(chosen), squeeze=False)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            axes = grid[row, column]
            axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if row > 0:
                axes.set_xlabel(f"{distances[chosen[column], row - 1]:.1f}", fontsize="small", labelpad=1)
        grid[row, 0].set_ylabel("sample" if row == 0 else f"nearest {row}", fontsize="small")
    figure.suptitle("Of each digit, the sample nearest to the training set; below it the nearest training images")
    save(figure, path)
