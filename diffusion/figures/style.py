"""What all figures share: look, size, and how they are saved."""

from pathlib import Path

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Font sizes for a picture that is shown at half of its 1,200 pixels in a README.
_SIZES = {"font.size": 12, "axes.labelsize": 12, "axes.titlesize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11}
_LOOK = {"figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
style.use(["seaborn-v0_8-ticks", "seaborn-v0_8-deep", {**_SIZES, **_LOOK, "legend.fontsize": 11}])
PALETTE: list[str] = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
MODEL, EXACT = PALETTE[0], PALETTE[2]
"""Colours of what the model does and of the exact answer, the same in all figures."""


def new_figure() -> tuple[Figure, Axes]:
    """Makes a figure with one pair of axes. It is not pyplot's: it needs no display and no closing."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the picture alone."""
    figure.savefig(path, metadata={"Software": None})
