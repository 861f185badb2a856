"""Images as files hold them, and as networks see them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.uint8]
"""Digits [n, 28, 28, 1], 0 is background: what `samples.npz` holds."""


def check_images(images: NDArray[Any], name: str = "images") -> None:
    """Raises ValueError unless these are digits as the project stores them."""
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28, 1) or len(images) == 0:
        raise ValueError(
            f"{name} must be uint8 [n, 28, 28, 1] with n at least 1; got {images.dtype} {list(images.shape)}"
        )


def to_pixels(images: Images) -> Tensor:
    """uint8 [n, 28, 28, 1] to float [n, 1, 28, 28] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
