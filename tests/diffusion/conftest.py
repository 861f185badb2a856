"""Figures that are drawn in less time."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are coarse and without a layout, which takes three times as long as drawing, and helps readers alone."""
    saved = Figure.savefig

    def coarsely(figure: Figure, path: Path, **options: Any) -> None:
        figure.set_layout_engine("none")
        saved(figure, path, dpi=50, **options)

    monkeypatch.setattr(Figure, "savefig", coarsely)
