"""Features of the Inception network that FID is quoted in, for those who must; its makers warn against MNIST."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.images.pixels import Images, check_images, to_pixels

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""The weights of Heusel et al. 2017, as pytorch-fid names them: the last part is the beginning of their sha256."""
_BATCH_SIZE = 50


def weights_path() -> Path:
    """Where torch.hub keeps the weights; UserError if they are not there, because nothing is fetched from here."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"Inception FID needs the file {WEIGHTS} of pytorch-fid's release `fid_weights` in {path.parent}; not found"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not sha256.startswith("6726825d"):
        raise UserError(f"{path} is not the file that FID is quoted in; its sha256 is {sha256}")
    return path


@torch.inference_mode()
def inception_features(images: Images) -> NDArray[Any]:
    """The last pooling layer, [n, 2048], for `frechet` of `diffusion/statistics/`; UserError if weights are missing."""
    check_images(images)
    # Asked for first, because pytorch_fid would download a file that is missing.
    weights_path()
    from pytorch_fid.inception import InceptionV3  # comes with denoising-diffusion-pytorch; imports torchvision

    network = InceptionV3().eval()
    parts = [
        network(to_pixels(images[start : start + _BATCH_SIZE]).expand(-1, 3, -1, -1))[0].flatten(1).numpy()
        for start in range(0, len(images), _BATCH_SIZE)
    ]
    return np.concatenate(parts)
