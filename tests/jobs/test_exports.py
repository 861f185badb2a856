"""Other tools read the sets that `sample --export` writes: as many images, of the same shape and the same pixels."""

import errno
import io
import os
import shutil
import tracemalloc
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from cleanfid import fid as cleanfid
from numpy.typing import NDArray
from PIL import Image
from pytorch_fid import fid_score
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from diffusion.data.mnist import MNIST
from diffusion.errors import UserError
from diffusion.settings import SamplerSettings
from diffusion.statistics.features import frechet
from jobs.sample import exports
from jobs.sample.exports import Form
from jobs.sample.sample_set import SampleSet, SampleSettings
from tests.launching import NO_FIGURES, TINY, done, launch

N = 70


def complete(folder: Path, images: NDArray[np.uint8]) -> SampleSet:
    """A set on disk that holds these images, in shards of 32."""
    settings = SampleSettings(1, "ema", "", SamplerSettings(sampler="ddim", steps=2), 0, "fp32", 16, 32)
    samples = SampleSet(folder, "s", settings, len(images), images[0].nbytes)
    samples.folder.mkdir(parents=True)
    for shard in range(samples.num_shards):
        start, stop = samples.shard_range(shard)
        np.save(samples.shard_path(shard), images[start:stop])
    samples.merge()
    return samples


@pytest.fixture
def digits(mnist_root: Path) -> NDArray[np.uint8]:
    """The first training digits and the first test digits."""
    return np.concatenate([MNIST.read_images(mnist_root, split)[:N] for split in ("train", "test")])


@pytest.fixture
def colours() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (N, 12, 20, 3), dtype=np.uint8)


def exported(samples: SampleSet, form: Form) -> Path:
    exports.export(samples, form)
    return exports.path(samples, form)


class Features(nn.Module):
    """In place of Inception, whose weights cannot be had in CI: the column in the middle of a digit."""

    def forward(self, x: Tensor) -> list[Tensor]:
        assert x.shape[1:] == (3, 28, 28)
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
        return [x[:, 0, 6:22, 14, None, None]]  # [b, 16, 1, 1]


class Extractor(FeatureExtractorBase):  # type: ignore[misc]
    """The same for torch-fidelity."""

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("column",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "column"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 28, 28, dtype=torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (Features()(x)[0].flatten(1).double() / 255,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scipy's square root of a matrix
def test_fid_tools_read_folders_of_real_digits(digits: NDArray[np.uint8], tmp_path: Path) -> None:
    pair = [digits[:N], digits[N:]]
    folders = [str(exported(complete(tmp_path / str(i), images), "png")) for i, images in enumerate(pair)]
    columns = [images[:, 6:22, 14, 0] / 255 for images in pair]
    for folder, x in zip(folders, columns, strict=True):
        mean, covariance = fid_score.compute_statistics_of_path(folder, Features(), 32, 16, "cpu", num_workers=0)
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-7)
    torch_fidelity.register_feature_extractor("column", Extractor)
    metrics = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        fid=True,
        feature_extractor="column",
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # and no processes that load
        verbose=False,
    )
    assert metrics["frechet_inception_distance"] == pytest.approx(frechet(*columns), rel=1e-3)


def test_clean_fid_reads_a_folder_and_a_zip_of_them(digits: NDArray[np.uint8], tmp_path: Path) -> None:
    samples = complete(tmp_path, digits)
    means = []

    def mean(x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 299, 299)  # it enlarges them itself
        return x.mean((2, 3))

    for form in ("png", "zip"):
        features = cleanfid.get_folder_features(
            str(exported(samples, form)), mean, num_workers=0, device=torch.device("cpu"), verbose=False
        )
        assert features.shape == (len(digits), 3)
        means.append(np.sort(features[:, 0]))  # in any order: it makes a set of the names in a zip
    np.testing.assert_array_equal(*means)
    np.testing.assert_allclose(means[0], np.sort(digits.mean((1, 2, 3))), rtol=0.05)


def test_each_form_holds_the_same_pixels(digits: NDArray[np.uint8], colours: NDArray[np.uint8], tmp_path: Path) -> None:
    for images in (digits, colours):
        samples = complete(tmp_path / str(images.shape[-1]), images)
        with np.load(exported(samples, "adm")) as archive:
            assert archive.files == ["arr_0"]
            array = archive["arr_0"]
        assert array.dtype == np.uint8
        assert np.array_equal(array, np.broadcast_to(images, (*images.shape[:-1], 3)))
        assert np.array_equal(np.load(exported(samples, "npy")), images)
        files = sorted(exported(samples, "png").iterdir())
        assert [path.name for path in files] == [f"{i:08d}.png" for i in range(len(images))]
        for path, image in zip(files, images, strict=True):
            with Image.open(path) as picture:
                assert np.array_equal(np.array(picture).reshape(image.shape), image)
        with zipfile.ZipFile(exported(samples, "zip")) as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                path.name: path.read_bytes() for path in files
            }


def test_classes_go_into_openais_file_in_little_memory(colours: NDArray[np.uint8], tmp_path: Path) -> None:
    samples = complete(tmp_path, colours)
    classes = io.BytesIO()
    np.save(classes, np.arange(2**20) % 10)  # of many more samples than there are
    with zipfile.ZipFile(samples.folder / "samples.npz", "a") as merged:
        merged.writestr("arr_1.npy", classes.getvalue())
    tracemalloc.start()
    path = exported(samples, "adm")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    with np.load(path) as archive:
        assert np.array_equal(archive["arr_0"], colours)
        assert np.array_equal(archive["arr_1"], np.arange(2**20) % 10)


@pytest.mark.parametrize("form", ["adm", "png", "zip", "npy"])
def test_an_export_appears_whole_or_not_at_all(
    form: Form, colours: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = complete(tmp_path, colours)
    goes_on, killed = samples.folder / ".export-png-9.1.tmp", samples.folder / ".export-png-9.2.tmp"
    goes_on.mkdir()
    before = sorted(samples.folder.iterdir())
    killed.mkdir()
    (killed / "00000000.png").touch()
    os.utime(killed, (0, 0))
    whole_shard, load = samples.shard_path(1), np.load

    def full_disk(path: Path, *rest: Any, **more: Any) -> Any:
        if path == whole_shard:
            raise OSError(errno.ENOSPC, "No space left on device")
        return load(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", full_disk)
        with pytest.raises(OSError, match="No space left"):
            exports.export(samples, form)
    assert sorted(samples.folder.iterdir()) == before
    assert exported(samples, form).exists()
    assert len(list(samples.folder.iterdir())) == len(before) + 1


def test_a_set_that_is_complete_needs_room_for_its_export_alone(
    colours: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = complete(tmp_path, colours)
    needed = exports.needed_bytes(samples, "npy", colours.shape[1:])
    assert needed == colours.nbytes
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with nullcontext() if free == needed else pytest.raises(UserError, match=r"of disk; 0\.00 GB are free"):
            samples.check_disk(needed)


def test_a_form_for_images_refuses_numbers() -> None:
    exports.check("npy", ())
    with pytest.raises(UserError, match="--export takes npy alone for samples that are no images; got png"):
        exports.check("png", ())


def test_the_same_command_exports_without_drawing(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", 5, "--name", "a", cwd=tmp_path, **NO_FIGURES)
    draw = ("sample", "1d/a", "--num-samples", 10, "--name", "s")
    refused = launch(*draw, "--export", "zip", cwd=tmp_path)
    assert refused.code == 2 and "no images" in refused.err
    folder = tmp_path / "runs" / "1d" / "a" / "samples" / "s"
    assert not folder.exists()
    assert "export" not in done(*draw, cwd=tmp_path).out
    shard = folder / "shard-00000.npy"
    drawn = shard.stat().st_mtime_ns
    assert "runs/1d/a/samples/s/export-npy-10.npy" in done(*draw, "--export", "npy", cwd=tmp_path).out
    array = np.load(folder / "samples.npz")["arr_0"]
    assert np.array_equal(np.load(folder / "export-npy-10.npy"), array)
    assert shard.stat().st_mtime_ns == drawn
    more = done("sample", "1d/a", "--num-samples", 20, "--name", "s", "--export", "npy", cwd=tmp_path)
    assert "export-npy-20.npy" in more.out
    assert len(np.load(folder / "export-npy-20.npy")) == 20
