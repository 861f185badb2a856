"""Images of the user's own, whatever files they lie in: read once into memory as uint8, and known by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.data import array_files, picture_files
from diffusion.data.array_files import CIFAR_FOLDER
from diffusion.data.idx import Split
from diffusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Labelled = tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """Images [n, height, width, channels] and their classes [n]."""

FEWEST = 20
"""Images that there must be for training."""
HELD_OUT_EVERY, MOST_HELD_OUT = 10, 10_000
"""If nothing says which images are for tests, every tenth is held out, up to this many."""


@dataclass(frozen=True)
class Loaded:
    """The images of a data set in memory."""

    images: Mapping[Split, NDArray[np.uint8]]
    """[n, height, width, channels]."""
    labels: Mapping[Split, NDArray[np.uint8]]
    """[n]; 0 where there are no classes."""
    sha256: str
    """Hash of all images and classes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.images["train"].shape[1:]
        return height, width, channels


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """A data set of images with this hash."""

    name: str
    height: int
    width: int
    channels: int
    sha256: str

    def num_test(self, root: Path) -> int:
        return len(self._load(root).images["test"])

    def read_images(self, root: Path, split: Split) -> NDArray[np.uint8]:
        return self._load(root).images[split]

    def read_labels(self, root: Path, split: Split) -> NDArray[np.uint8]:
        return self._load(root).labels[split]

    def digest(self) -> str:
        return self.sha256

    def fetch(self, root: Path, *, say: Callable[[str], None]) -> None:
        """Only checks: nobody else has these images."""
        self.require(root)

    def require(self, root: Path) -> None:
        """Raises UserError unless these are the images that the run began with."""
        if (found := self._load(root).sha256) != self.sha256:
            raise UserError(
                f"the images in {root} are not those that the run began with: their sha256 is {found} instead of "
                f"{self.sha256}; --data.root names the folder where those are"
            )

    def _load(self, root: Path) -> Loaded:
        return load(root, (self.height, self.width), self.channels)


_loaded: dict[tuple[Path, tuple[int, ...], int | None], Loaded] = {}
"""The last data set that was read: a process needs one, and several times."""


def load(root: Path, size: tuple[int, ...], channels: int | None) -> Loaded:
    """Reads images once in a process, and makes them of this size and so many channels; () and None is as they are.

    Raises UserError, naming the file, for what cannot be used.
    """
    import numpy as np

    if (known := _loaded.get((root, size, channels))) is not None:
        return known
    splits = _read(root, size, channels)
    if "test" not in splits:
        images, labels = splits["train"]
        # Every tenth, not the last tenth: in folders images are sorted by class, and each class must have its share.
        held_out = slice(HELD_OUT_EVERY - 1, HELD_OUT_EVERY * MOST_HELD_OUT, HELD_OUT_EVERY)
        rest = np.delete(images, held_out, axis=0), np.delete(labels, held_out)
        splits = {"train": rest, "test": (images[held_out], labels[held_out])}
    if (n := len(splits["train"][0])) < FEWEST:
        raise UserError(f"a data set needs at least {FEWEST} images for training; {root} holds {n} and those for tests")
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len(shapes) > 1 or len(splits["test"][0]) == 0:
        raise UserError(f"images for training and tests must be of one size, and some of each; got {shapes} in {root}")
    hashed = hashlib.sha256()
    for split, (images, labels) in splits.items():
        # With the shapes, because the same bytes may be other images.
        hashed.update(f"{split} {images.shape}\n".encode() + images.tobytes() + labels.tobytes())
    loaded = Loaded(
        {split: images for split, (images, _) in splits.items()},
        {split: labels for split, (_, labels) in splits.items()},
        hashed.hexdigest(),
    )
    _loaded.clear()
    # Also under what was found, because experiment.json holds that: whoever asks next names it.
    for key in ((root, size, channels), (root, loaded.shape[:2], loaded.shape[2])):
        _loaded[key] = loaded
    return loaded


def _read(root: Path, size: tuple[int, ...], channels: int | None) -> dict[Split, Labelled]:
    """Reads the images for training, and those for tests if they are told apart."""
    try:
        if root.is_file():
            if root.suffix not in (".npy", ".npz"):
                raise UserError(f"--data.root must name a folder, an .npy or an .npz file; got {root}")
            found = array_files.read_npy(root) if root.suffix == ".npy" else array_files.read_npz(root)
        elif not root.is_dir():
            raise UserError(f"--data.root must name a folder of images, or a file of them; {root} is not there")
        elif cifar := [folder for folder in (root, root / CIFAR_FOLDER) if (folder / "data_batch_1").is_file()]:
            found = array_files.read_cifar(cifar[0])
        elif files := array_files.idx_files(root):
            found = array_files.read_idx(files)
        else:
            return _pictures(root, size, channels)
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    splits: tuple[Split, ...] = ("train", "test")
    # Not strict, because files may hold images for training alone.
    return {split: _checked(root, *pair, size, channels) for split, pair in zip(splits, found, strict=False)}


def _pictures(root: Path, size: tuple[int, ...], channels: int | None) -> dict[Split, Labelled]:
    """Reads the pictures in a folder, or in its folders train and test."""
    if not (root / "train").is_dir():
        images, labels, _ = picture_files.read_split(root, size, channels)
        return {"train": (images, labels)}
    splits: tuple[Split, ...] = ("train", "test")
    if strange := sorted(path.name for path in root.glob("[!.]*") if path.name not in splits):
        raise UserError(f"beside its folder train, {root} may hold the folder test alone; it holds {strange[0]}")
    found = {
        split: picture_files.read_split(root / split, size, channels) for split in splits if (root / split).is_dir()
    }
    classes = [names for _, _, names in found.values()]
    if any(names != classes[0] for names in classes):
        raise UserError(f"train and test in {root} must hold the same classes; got {classes[0]} and {classes[1]}")
    return {split: (images, labels) for split, (images, labels, _) in found.items()}


def _checked(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8] | None, size: tuple[int, ...], channels: int | None
) -> Labelled:
    """Arrays from a file as images [n, height, width, channels] of the size asked for, and classes [n]."""
    import numpy as np
    from PIL import Image

    shape = f"{images.dtype} {list(images.shape)}"
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"images must be uint8 [n, height, width] or [n, height, width, 3]; got {shape} in {path}")
    asked = (*(size or images.shape[1:3]), channels or images.shape[-1])
    if max(asked[:2]) > picture_files.LARGEST:
        most = picture_files.LARGEST
        raise UserError(f"images may have {most}x{most} pixels: --data.size makes them smaller; got {shape} in {path}")
    if images.shape[1:] != asked:
        pictures = (Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images)
        images = np.stack([picture_files.fitted(picture, size, channels) for picture in pictures])
    if labels is None or len(images) == 0:
        return np.ascontiguousarray(images), np.zeros(len(images), np.uint8)
    if labels.shape not in ((len(images),), (len(images), 1)):
        got = f"{list(labels.shape)} for {len(images)} images in {path}"
        raise UserError(f"there must be one class for each image, as [n] or [n, 1]; got {got}")
    first = labels.reshape(-1)
    if not (np.issubdtype(first.dtype, np.integer) and first.min() >= 0 and first.max() < 256):
        raise UserError(f"classes must be whole numbers from 0 to 255; {path} holds others")
    return np.ascontiguousarray(images), first.astype(np.uint8)
