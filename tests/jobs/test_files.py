"""Files appear whole or not at all."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from jobs.files import whole_folder, write_atomically
from jobs.storage.records import append
from tests.disturbances import fill_up, small_disk
from tests.launching import launch, sentence
from tests.old_runs import ARCHIVES, unpack


def test_a_file_is_the_old_one_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    synced = []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, path.read_text()))

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(path, "new")
    # First its bytes, then its name in the folder.
    assert synced == [(path.stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]


def test_a_file_system_that_cannot_sync_a_folder_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "status.json", "new")
    assert (tmp_path / "status.json").read_text() == "new"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("status.json", "old")]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(8192))
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        fill_up(disk / "filler")
        with pytest.raises(OSError, match="No space left") as refused:
            write_atomically(disk / "status.json", "new")
        assert refused.value.filename == str(disk / "status.json")
        # The system names what is copied, of which people would think that it is on the full disk.
        with pytest.raises(OSError, match="No space left") as refused, whole_folder(disk / "model") as folder:
            shutil.copyfile(tmp_path / "big", folder / "big")
        assert refused.value.filename == str(disk / "model")
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_command_says_that_the_disk_is_full_in_one_sentence(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=16) as disk:
        run = unpack(ARCHIVES[0], "1d", disk / "runs", tmp_path)
        settings = (run / "experiment.json").read_text()
        fill_up(disk / "filler")
        for command, file in ((("report",), "report.html"), (("resume", "--train.steps", 4000), "experiment.json")):
            ended = launch(command[0], run, *command[1:], cwd=disk)
            assert ended.code == 2 and sentence(ended.err).endswith(f"{file}: No space left on device"), ended
        assert (run / "experiment.json").read_text() == settings
        grid = ("sweep", "1d", "--grid", "train.lr=1e-3,2e-3", "--name", "s")
        for command, made in ((("train", "1d", "--name", "b"), "b"), (grid, "s-000")):
            ended = launch(*command, cwd=disk)
            expected = f"error: runs/1d/{made} cannot be made: No space left on device"
            assert ended.code == 2 and sentence(ended.err) == expected, ended
        assert [path.name for path in (disk / "runs" / "1d").iterdir()] == [run.name]
        with pytest.raises(OSError, match="No space left on device") as refused:
            append(run / "faults.jsonl", {"cause": "x" * 4096})
        assert refused.value.filename == str(run / "faults.jsonl")
