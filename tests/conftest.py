"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest

from jobs import mnist_files


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with MNIST in it: $MNIST_ROOT if that is complete, else fetched once for the session."""
    if "MNIST_ROOT" in os.environ:
        root = Path(os.environ["MNIST_ROOT"])
        try:
            mnist_files.require(root)
            return root
        except ValueError:
            pass
    root = tmp_path_factory.mktemp("mnist")
    mnist_files.fetch(root)
    return root
