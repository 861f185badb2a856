"""Images of the user's own in files of arrays: npy, npz, IDX, and CIFAR-10 as torchvision lays it out."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.data.mnist_wheel import load_arrays
from diffusion.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Split = tuple[NDArray[Any], NDArray[Any] | None]
    """Images, and their classes if there are any."""

NPZ_NAMES = (
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST's
    ("x_train", "y_train", "x_test", "y_test"),  # Keras'
    ("images", "labels"),
    ("arr_0", "arr_1"),
)
IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MOST_PACKED = 1032
"""The largest factor by which gzip makes data smaller."""
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""md5 of each file of CIFAR-10, as torchvision has them."""


def read_npy(path: Path) -> list[Split]:
    """The images of an npy file; UserError if it holds anything but an array."""
    import numpy as np

    array = _numpy(path)
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} must hold an array; it is an .npz file")
    return [(np.array(array), None)]


def read_npz(path: Path) -> list[Split]:
    """The images of an npz file for training, and for tests if there are any."""
    import numpy as np

    arrays = _numpy(path)
    if isinstance(arrays, np.ndarray):
        raise UserError(f"{path} must be an .npz file; it is an .npy file")
    for names in NPZ_NAMES:
        if names[0] in arrays:
            pairs = zip(names[::2], names[1::2], strict=True)
            try:
                found = [(arrays[images], arrays.get(labels)) for images, labels in pairs if images in arrays]
            except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            # What is no array in there, numpy returns as bytes.
            return [(np.asarray(images), None if labels is None else np.asarray(labels)) for images, labels in found]
    known = ", ".join(names[0] for names in NPZ_NAMES)
    raise UserError(f"{path} must hold images as one of {known}; it holds {', '.join(arrays) or 'nothing'}")


def idx_files(folder: Path) -> dict[str, Path]:
    """The files of MNIST's format in a folder, packed or not, by their names."""
    paths = ((name, folder / f"{name}{suffix}") for name in IDX_NAMES for suffix in (".gz", ""))
    return {name: path for name, path in paths if path.is_file()}


def read_idx(files: dict[str, Path]) -> list[Split]:
    """The images of IDX files for training, and for tests if they are there."""
    if IDX_NAMES[0] not in files:
        raise UserError(f"{IDX_NAMES[0]} must lie beside {next(iter(files.values()))}")
    arrays = {name: _idx(path) for name, path in files.items()}
    pairs = zip(IDX_NAMES[::2], IDX_NAMES[1::2], strict=True)
    return [(arrays[images], arrays.get(labels)) for images, labels in pairs if images in arrays]


def read_cifar(folder: Path) -> list[Split]:
    """The images of CIFAR-10 [n, 32, 32, 3], training and tests, from pickles of which nothing is executed."""
    import numpy as np

    def read(names: Iterable[str]) -> Split:
        parts = []
        for name in names:
            path = folder / name
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            # Said to be not for security, because a Python in FIPS mode refuses md5 otherwise.
            if (md5 := hashlib.md5(content, usedforsecurity=False).hexdigest()) != CIFAR_MD5[name]:
                raise UserError(f"{path} is not CIFAR-10's own file: its md5 is {md5} instead of {CIFAR_MD5[name]}")
            parts.append(load_arrays(io.BytesIO(content)))
        # A row holds its pixels colour by colour: all red ones, then green and blue.
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.concatenate([part["labels"] for part in parts])

    train, test = [name for name in CIFAR_MD5 if name != "test_batch"], ["test_batch"]
    try:
        return [read(train), read(test)]
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error


def _numpy(path: Path) -> Any:
    import numpy as np

    try:
        # Mapped, so that a file which claims to be larger than it is takes no memory.
        # The size in a file's header may overflow, of which numpy would only warn.
        with np.errstate(over="raise"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, ArithmeticError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _idx(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size = math.prod(shape)
            fits = (zero, kind) == (0, 8) and size <= MOST_PACKED * path.stat().st_size
            body = file.read(size + 1) if fits else b""  # not more, however much is packed in there
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not fits or len(body) != size:
        raise UserError(f"{path} must be an IDX file of unsigned bytes, as MNIST's are")
    return np.frombuffer(body, np.uint8).reshape(shape)
