"""The training images that are nearest to other images: who looks like one of them may be a copy."""

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.images.pixels import Images, check_images
from diffusion.statistics.bootstrap import Floats

_CHUNK = 250
"""Images whose distances are computed together: to 60,000 training images, they take 60 MB."""


def nearest(images: Images, training: Images, neighbours: int = 1) -> tuple[Floats, NDArray[np.int64]]:
    """Returns Euclidean distances, in pixels from 0 to 1, and indices of the nearest training images, [n, neighbours].

    Nearest first. The search is in float32; the distances are exact, 0 for a copy.
    """
    check_images(images)
    check_images(training, "training images", images.shape[1:])
    if len(training) < neighbours:
        raise ValueError(f"neighbours must be at most the number of training images; got {neighbours}")
    flat, flat_training = images.reshape(len(images), -1), torch.from_numpy(training.reshape(len(training), -1)).float()
    squares = flat_training.square().sum(1)
    distances, indices = [], []
    for start in range(0, len(images), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        # |x - y|^2 without |x|^2, which is the same for all y.
        partial = squares - 2 * torch.from_numpy(chunk).float() @ flat_training.T  # [chunk, training]
        found = partial.topk(neighbours, largest=False).indices.numpy()
        # As whole numbers, and not as uint8, whose differences would wrap around: a copy has distance 0 exactly.
        difference = chunk[:, None].astype(np.int64) - training.reshape(len(training), -1)[found]
        exact = np.sqrt((difference**2).sum(-1)) / 255
        order = exact.argsort(axis=1, kind="stable")
        distances.append(np.take_along_axis(exact, order, 1))
        indices.append(np.take_along_axis(found, order, 1))
    return np.concatenate(distances), np.concatenate(indices)
