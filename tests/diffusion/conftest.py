"""Figures that are drawn in less time."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are coarse, with numbers in place of axes and without a layout: these take longer than all data."""
    saved = Figure.savefig

    def coarsely(figure: Figure, path: Path, **options: Any) -> None:
        figure.set_layout_engine("none")
        for axes in figure.axes:
            axes.set_title(f"{axes.get_title()} {axes.get_xlim()} {axes.get_ylim()}")
            axes.set_axis_off()
        saved(figure, path, dpi=50, **options)

    monkeypatch.setattr(Figure, "savefig", coarsely)
