"""Fashion-MNIST lies where torchvision expects it, comes from its mirror, and has the hashes of its files."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from diffusion.problems.fashion_mnist import FASHION_MNIST, FashionMnistProblem
from jobs.experiments.table import EXPERIMENTS
from tests import made_images
from tests.jobs.mirror import Mirror, say_nothing

DEBIANS = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FashionMnistProblem:
    """The problem with a small data set of the same format."""
    monkeypatch.setattr(FashionMnistProblem, "data_set", made_images.make(tmp_path, FASHION_MNIST, 28, 28))
    return FashionMnistProblem(root=str(tmp_path))


def test_torchvision_reads_the_same(problem: FashionMnistProblem) -> None:
    for split in ("train", "test"):
        theirs = datasets.FashionMNIST(problem.root, train=split == "train", download=False)
        ours = problem.data_set.read_images(Path(problem.root), split)
        assert np.array_equal(theirs.data.numpy(), ours[..., 0])
        assert np.array_equal(theirs.targets.numpy(), problem.data_set.read_labels(Path(problem.root), split))


def test_the_files_are_fetched_from_a_mirror(problem: FashionMnistProblem, tmp_path: Path) -> None:
    raw = problem.data_set.raw_folder(Path(problem.root))
    packed = {path.name: gzip.compress(path.read_bytes(), 1) for path in raw.iterdir()}
    with Mirror(packed) as mirror:
        problem.data_set.fetch(tmp_path / "new", mirrors=[mirror.url], say=say_nothing)
    problem.data_set.require(tmp_path / "new")


def test_the_mirror_is_torchvisions() -> None:
    assert list(FASHION_MNIST.mirrors) == datasets.FashionMNIST.mirrors
    assert set(FASHION_MNIST.sha256) == {name.removesuffix(".gz") for name, _ in datasets.FashionMNIST.resources}


@pytest.mark.data
def test_the_hashes_are_those_of_the_real_files(tmp_path: Path) -> None:
    raw = FASHION_MNIST.raw_folder(tmp_path)
    raw.mkdir(parents=True)
    for name in FASHION_MNIST.sha256:
        (raw / name).write_bytes(gzip.decompress((DEBIANS / f"{name}.gz").read_bytes()))
    FASHION_MNIST.require(tmp_path)


def test_the_experiment_is_that_of_mnist_with_other_data() -> None:
    ours, theirs = (EXPERIMENTS[name].preset for name in ("fashion-mnist-small", "mnist-small"))
    train = replace(theirs.train, noise_levels=None, keep_every=0)  # which digits need for autoguidance
    assert (ours.model, ours.diffusion, ours.train) == (theirs.model, theirs.diffusion, train)
