"""Figures that are drawn in less time."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To lay out a figure takes three times as long as to draw it, and only a reader wants it."""
    saved = Figure.savefig

    def coarsely(figure: Figure, path: Path, **options: Any) -> None:
        figure.set_layout_engine("none")
        saved(figure, path, dpi=50, **options)

    monkeypatch.setattr(Figure, "savefig", coarsely)
