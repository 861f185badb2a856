"""Images as files hold them, and as networks see them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.uint8]
"""Images [n, height, width, channels], 0 is dark: what `samples.npz` holds."""


def check_images(images: NDArray[Any], name: str = "images", shape: tuple[int, int, int] | None = None) -> None:
    """Raises ValueError unless these are images as the project stores them, of this shape if one is given."""
    fits = images.ndim == 4 and shape in (None, images.shape[1:])
    if images.dtype != np.uint8 or not fits or len(images) == 0:
        wanted = ", ".join(map(str, ("n", *(shape or ("height", "width", "channels")))))
        raise ValueError(f"{name} must be uint8 [{wanted}] with n at least 1; got {images.dtype} {list(images.shape)}")


def scaled(images: Tensor) -> Tensor:
    """uint8 to x0 in [-1, 1], where a diffusion begins; same shape."""
    return images.float().div_(127.5).sub_(1)


def unscaled(x0: Tensor) -> Images:
    """x0 [n, channels, height, width] in [-1, 1] to uint8 [n, height, width, channels]."""
    pixels = ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: Images) -> Tensor:
    """uint8 [n, height, width, channels] to float [n, channels, height, width] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
