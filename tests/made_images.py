"""A small data set in MNIST's format, made up: blobs of light at places that depend on their class."""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.data.idx import IdxDataset


def make(root: Path, like: IdxDataset, height: int, width: int, train: int = 300, test: int = 120) -> IdxDataset:
    """Writes the files into `root`; returns their description."""
    files = {}
    for split, n in (("train", train), ("t10k", test)):
        random = np.random.default_rng(n)
        labels = random.integers(0, 10, n).astype(np.uint8)
        centre = np.stack([height * (0.2 + 0.06 * labels), width * (0.8 - 0.06 * labels)], 1) + random.normal(
            0, 1, (n, 2)
        )
        rows, columns = np.arange(height)[:, None], np.arange(width)
        far = (rows - centre[:, 0, None, None]) ** 2 + (columns - centre[:, 1, None, None]) ** 2
        files[f"{split}-images-idx3-ubyte"] = idx((255 * np.exp(-far / 8)).astype(np.uint8))
        files[f"{split}-labels-idx1-ubyte"] = idx(labels)
    made = replace(
        like,
        height=height,
        width=width,
        count={"train": train, "test": test},
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        mirrors=(),
    )
    made.raw_folder(root).mkdir(parents=True)
    for name, content in files.items():
        (made.raw_folder(root) / name).write_bytes(content)
    return made


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
