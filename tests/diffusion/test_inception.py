"""Inception FID without its weights says what is missing."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.inception import WEIGHTS, inception_features

DIGITS = np.zeros((2, 28, 28, 1), np.uint8)


def test_missing_and_foreign_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"Inception FID needs the file {WEIGHTS} .* in {tmp_path}.*; not found"):
        inception_features(DIGITS)
    path = tmp_path / "hub" / "checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the file that FID is quoted in; its sha256 is "):
        inception_features(DIGITS)
