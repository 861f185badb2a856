"""MNIST's files on a server of this machine, for the tests that fetch them."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.data.mnist import MNIST
from tests.jobs.mirror import Mirror


@pytest.fixture(scope="session")
def packed(mnist_root: Path) -> dict[str, bytes]:
    return {name: gzip.compress((MNIST.raw_folder(mnist_root) / name).read_bytes(), 1) for name in MNIST.sha256}


@pytest.fixture
def mirror(packed: dict[str, bytes]) -> Iterator[Mirror]:
    with Mirror(packed) as mirror:
        yield mirror
