"""The folder of MNIST's files holds whole ones, whoever fetches at once, is killed or cannot write."""

import errno
import fcntl
import multiprocessing
import resource
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from diffusion.errors import UserError
from tests.jobs.mirror import PACKED, SMALL, Mirror, dripping, good, names_in, raises_sentence, say_nothing
from tests.launching import wait_until


def test_two_processes_share_one_download(mirror: Mirror, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    kwargs = {"mirrors": [mirror.url], "patience_s": 60}
    processes = [spawn.Process(target=SMALL.fetch, args=(tmp_path,), kwargs=kwargs) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    SMALL.require(tmp_path)
    assert names_in(tmp_path) == sorted(SMALL.sha256)
    assert mirror.requests == list(SMALL.sha256)


def test_two_at_once_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    both_ask = threading.Barrier(2, timeout=60)

    def together(request: BaseHTTPRequestHandler, packed: bytes) -> None:
        both_ask.wait()
        good(request, packed)

    with Mirror(PACKED, together) as mirror:
        kwargs = {"mirrors": [mirror.url], "patience_s": 60, "say": say_nothing}
        threads = [threading.Thread(target=SMALL.fetch, args=(tmp_path,), kwargs=kwargs) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert sorted(mirror.requests) == sorted([*SMALL.sha256, *SMALL.sha256])
    SMALL.require(tmp_path)
    assert names_in(tmp_path) == sorted(SMALL.sha256)


def test_a_killed_fetch_does_not_stand_in_the_way(mirror: Mirror, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with Mirror(train_labels_idx1_ubyte=dripping) as slow:
        kwargs = {"mirrors": [slow.url], "patience_s": 60}
        process = spawn.Process(target=SMALL.fetch, args=(tmp_path,), kwargs=kwargs)
        process.start()
        wait_until(lambda: len(slow.requests) >= 2)
        process.kill()
        process.join()
    SMALL.fetch(tmp_path, mirrors=[mirror.url], say=say_nothing)
    SMALL.require(tmp_path)
    assert names_in(tmp_path) == sorted(SMALL.sha256)
    assert mirror.requests == list(SMALL.sha256)[1:]  # what the killed one had finished was kept


def test_root_that_cannot_be_written_is_one_sentence(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_sentence(UserError, str(tmp_path / "file" / "data"), "Not a directory"):
        SMALL.fetch(tmp_path / "file" / "data", mirrors=[mirror.url], say=say_nothing)
    assert mirror.requests == []


def test_disk_that_fills_up_leaves_no_partial_file(mirror: Mirror, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))  # as a full disk would, in the midst of a file
    try:
        with raises_sentence(UserError, "cannot be written", "File too large"):
            SMALL.fetch(tmp_path / "data", mirrors=[mirror.url], say=say_nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
