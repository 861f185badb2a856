"""Where figures of images put them, and what is written beside them."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion.images import figures


def test_each_image_stands_below_its_label_and_beside_that_of_its_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    columns = [np.full((2, 3, 5, 1), 20 * column, np.uint8) for column in range(4)]
    for images in columns:
        images[1] += 7  # the second row
    figures._labelled(columns, list("abcd"), "title", tmp_path / "a.png", ("guidance", ["0", "1"]))
    (axes,) = drawn[0].axes
    (sheet,) = axes.get_images()
    pixels = sheet.get_array()
    assert pixels is not None
    for column, (x, label) in enumerate(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)):
        assert label.get_text() == "abcd"[column]
        for row, (y, beside) in enumerate(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)):
            assert beside.get_text() == "01"[row]
            middle, left, above = pixels[int(y), int(x)], pixels[int(y), int(x) - 2], pixels[int(y) - 1, int(x)]
            assert middle == left == above == 20 * column + 7 * row
    assert axes.get_ylabel() == "guidance"
