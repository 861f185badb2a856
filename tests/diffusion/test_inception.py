"""Inception FID: its features are pytorch-fid's, and without its weights it says what is missing."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid import fid_score, inception

from diffusion.errors import UserError
from diffusion.images.inception import WEIGHTS, inception_features

DIGITS = np.zeros((2, 28, 28, 1), np.uint8)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    return path


def test_missing_and_foreign_weights_are_named(path: Path) -> None:
    with pytest.raises(UserError, match=f"Inception FID needs the file {WEIGHTS} .* in {path.parent}; not found"):
        inception_features(DIGITS)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the file that FID is quoted in; its sha256 is "):
        inception_features(DIGITS)


def test_the_features_are_those_that_pytorch_fid_finds_in_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The published weights cannot be had in CI; the same network with random ones takes the same way.
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda self, state_dict: None)
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # or the features vanish on their way
    torch.save(network.state_dict(), path)
    monkeypatch.setattr("diffusion.images.inception.weights_path", lambda: path)
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    files = [path.parent / f"{i}.png" for i in range(len(digits))]
    for file, digit in zip(files, digits, strict=True):
        Image.fromarray(digit[..., 0]).save(file)
    theirs = fid_score.get_activations(files, inception.InceptionV3(), batch_size=2, num_workers=0)
    ours = inception_features(digits)
    assert ours.shape == (3, 2048)
    assert ours.std(axis=0).max() > 0.01 * ours.max()  # the digits differ
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * ours.max())
