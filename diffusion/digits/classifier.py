"""The digit classifier that the project ships; its features are what the metrics of digits compare."""

from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.data.mnist import CLASSIFIER
from diffusion.images.pixels import Images, check_images, to_pixels

FEATURES = 64
SHAPE = (28, 28, 1)
"""Shape of a digit as files hold it."""
_BATCH_SIZE = 500


class DigitNet(nn.Module):
    """Three convolutions and two linear layers, 108,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(1, 24),  # [n, 24, 14, 14]
            *_convolution(24, 48),  # [n, 48, 7, 7]
            *_convolution(48, 96),  # [n, 96, 3, 3]
            nn.Flatten(),
        )
        self.linear = nn.Linear(96 * 3 * 3, FEATURES, bias=False)
        # Without scale and shift of its own: in training each feature has mean 0 and variance 1.
        self.normalise = nn.BatchNorm1d(FEATURES, affine=False)
        self.last = nn.Linear(FEATURES, 11)

    def features(self, x: Tensor) -> Tensor:
        """x [n, 1, 28, 28] in [0, 1] to [n, 64], before the last nonlinearity, so that none is stuck at zero."""
        normalised: Tensor = self.normalise(self.linear(self.convolutions(x)))
        return normalised

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 1, 28, 28] in [0, 1] to logits [n, 11] of the ten digits and of what is no digit."""
        logits: Tensor = self.last(F.relu(self.features(x)))
        return logits


def load() -> DigitNet:
    """The shipped classifier, at least 99.3% right on the test digits (train_classifier.py made it)."""
    net = DigitNet()
    net.load_state_dict(safetensors.torch.load(CLASSIFIER.read_bytes()))
    return net.eval()


@torch.inference_mode()
def classify(net: DigitNet, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features [n, 64] and probabilities of the digits [n, 10]; ValueError for what are no digits.

    The probabilities of an image sum to 1 less that of being no digit. An image's numbers do not depend on the other
    images: the network always sees full batches, the last one filled up.
    """
    check_images(images, shape=SHAPE)
    features, probabilities = [], []
    for start in range(0, len(images), _BATCH_SIZE):
        batch = images[start : start + _BATCH_SIZE]
        # F.pad counts dimensions from the last one: the eighth number is how many empty images follow.
        x = F.pad(to_pixels(batch), (0, 0, 0, 0, 0, 0, 0, _BATCH_SIZE - len(batch)))
        h = net.features(x)[: len(batch)]
        features.append(h.numpy())
        probabilities.append(net.last(F.relu(h)).softmax(1)[:, :10].numpy())
    return np.concatenate(features), np.concatenate(probabilities)


def check_labels(labels: NDArray[Any], n: int, name: str = "labels") -> None:
    """Raises ValueError unless these are n digits."""
    is_list = labels.shape == (n,) and n > 0 and np.issubdtype(labels.dtype, np.integer)
    if not is_list or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{name} must be {n} whole numbers from 0 to 9; got {labels.dtype} {list(labels.shape)}")


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # Without a bias: the norm that follows takes each mean away, and has a shift of its own.
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
