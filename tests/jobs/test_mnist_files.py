"""MNIST's files against torchvision's own reader, and mirrors that fail in every way."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import idx
from diffusion.data.idx import DataUnavailable
from diffusion.data.mnist import MNIST
from diffusion.errors import UserError
from tests.jobs.mirror import (
    PACKED,
    SMALL,
    Answer,
    Mirror,
    altered,
    broken_off,
    cut,
    dripping,
    good,
    log_in_page,
    names_in,
    no_http,
    not_found,
    raises_sentence,
    say_nothing,
    too_long,
    unpacks_too_long,
    without_length,
)

LABELS = "t10k-labels-idx1-ubyte"


# --- Reading ---


def test_torchvision_reads_the_same(mnist_root: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for split in ("train", "test"):
        theirs = datasets.MNIST(str(mnist_root), train=split == "train", download=False)
        assert np.array_equal(theirs.data.numpy(), MNIST.read_images(mnist_root, split)[..., 0])
        assert np.array_equal(theirs.targets.numpy(), MNIST.read_labels(mnist_root, split))


def test_arrays_are_what_everyone_knows_of_mnist(mnist_root: Path) -> None:
    images, labels = MNIST.read_images(mnist_root, "train"), MNIST.read_labels(mnist_root, "train")
    assert images.shape == (60_000, 28, 28, 1)
    assert images.dtype == labels.dtype == np.dtype(np.uint8)
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (round(images.mean() / 255, 4), round(images.std() / 255, 4)) == (0.1307, 0.3081)
    assert MNIST.read_images(mnist_root, "test").shape == (10_000, 28, 28, 1)
    assert MNIST.read_labels(mnist_root, "test")[:5].tolist() == [7, 2, 1, 0, 4]


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'torchvision', 'numpy', 'tqdm', 'urllib.request'}"
    code = f"import sys, diffusion.data.mnist; print({heavy} & set(sys.modules))"
    repository = Path(idx.__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=repository, text=True) == "set()\n"


# --- Files that are there ---


def test_complete_folder_is_left_alone_without_a_word(mnist_root: Path, mirror: Mirror) -> None:
    said: list[str] = []
    before = MNIST.raw_folder(mnist_root).stat().st_mtime_ns
    MNIST.fetch(mnist_root, mirrors=[mirror.url], say=said.append)
    assert (said, mirror.requests) == ([], [])
    assert MNIST.raw_folder(mnist_root).stat().st_mtime_ns == before  # not even a lock was made


@pytest.mark.parametrize("check", [MNIST.require, MNIST.fetch])
def test_wrong_file_is_named_and_kept(check: Callable[[Path], None], mnist_root: Path, tmp_path: Path) -> None:
    MNIST.raw_folder(tmp_path).mkdir(parents=True)
    for name in MNIST.sha256:
        (MNIST.raw_folder(tmp_path) / name).symlink_to(MNIST.raw_folder(mnist_root).absolute() / name)
    path = MNIST.raw_folder(tmp_path) / LABELS
    right = path.read_bytes()
    check(tmp_path)

    path.unlink()
    path.write_bytes(right[:-1])
    with raises_sentence(UserError, str(path), "10007 bytes instead of 10008", "delete it"):
        check(tmp_path)
    assert path.read_bytes() == right[:-1]

    flipped = bytearray(right)
    flipped[5000] ^= 1
    path.write_bytes(flipped)
    with raises_sentence(UserError, str(path), "sha256", "delete it"):
        check(tmp_path)
    assert path.read_bytes() == flipped


def test_require_names_what_is_missing_and_the_cure(tmp_path: Path) -> None:
    with raises_sentence(UserError, str(MNIST.raw_folder(tmp_path)), LABELS, "launch.py"):
        MNIST.require(tmp_path)
    (tmp_path / "file").touch()
    with raises_sentence(UserError, LABELS):
        MNIST.require(tmp_path / "file")


# --- Mirrors ---


@pytest.mark.parametrize("answer", [good, without_length])
def test_fetch_from_a_good_mirror(answer: Answer, tmp_path: Path) -> None:
    with Mirror(PACKED, answer) as mirror:
        SMALL.fetch(tmp_path / "new" / "data", mirrors=[mirror.url], say=say_nothing)
    SMALL.require(tmp_path / "new" / "data")
    assert names_in(tmp_path / "new" / "data") == sorted(SMALL.sha256)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (broken_off, "broke off after"),
        (cut, "gz is wrong"),
        (altered, "sha256"),
        (log_in_page, "gz is wrong"),
        (too_long, "longer than"),
        (unpacks_too_long, "sha256"),
        (not_found, "404"),
        (dripping, "too slow"),
        (no_http, "SSH-2.0"),
    ],
)
def test_mirror_that_fails_is_left_for_the_next(answer: Answer, reason: str, mirror: Mirror, tmp_path: Path) -> None:
    said: list[str] = []
    patience_s = 3 if answer is dripping else 60
    with Mirror(train_labels_idx1_ubyte=answer) as bad:
        SMALL.fetch(tmp_path, mirrors=[bad.url, mirror.url], patience_s=patience_s, say=said.append)
    SMALL.require(tmp_path)
    assert names_in(tmp_path) == sorted(SMALL.sha256)
    assert reason in said[1] and "\n" not in said[1]
    assert bad.requests == list(SMALL.sha256)[:2]  # not asked again after its failure
    assert mirror.requests == list(SMALL.sha256)[1:]


def test_mirrors_that_cannot_be_reached_cost_little_time_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, is_over = socket.getaddrinfo, threading.Event()

    def hanging_look_up(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "mirror.invalid":
            is_over.wait()
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hanging_look_up)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with raises_sentence(
            DataUnavailable,
            "http://mirror.invalid/ (no answer within 0.5 s)",
            silent_url,
            *SMALL.sha256,
            str(SMALL.raw_folder(tmp_path / "data")),
            "by hand",
        ):
            mirrors = ["http://mirror.invalid/", silent_url]
            SMALL.fetch(tmp_path / "data", mirrors=mirrors, patience_s=0.5, say=say_nothing)
    refusing_url = "http://127.0.0.1:1/"
    with raises_sentence(DataUnavailable, refusing_url, "refused"):
        SMALL.fetch(tmp_path / "data", mirrors=[refusing_url], patience_s=60, say=say_nothing)
    is_over.set()
    assert list(tmp_path.iterdir()) == []
