"""What all figures share: look, size, and how they are saved."""

from pathlib import Path

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Font sizes for a picture that is shown at half of its 1,200 pixels in a README.
sns.set_theme(
    context="notebook", style="ticks", palette="deep", rc={"figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.3}
)
MODEL, EXACT = sns.color_palette("deep")[0], sns.color_palette("deep")[3]
"""Colours of what the model does and of the exact answer, the same in all figures."""


def new_figure(width: float = 8, height: float = 4.5) -> tuple[Figure, Axes]:
    """Makes a figure with one pair of axes; sizes in inches. It is not pyplot's: it needs no display and no closing."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the picture alone."""
    sns.despine(figure)
    figure.savefig(path, metadata={"Software": None})
