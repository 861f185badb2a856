"""A file system that stands still: training goes on, and saves when it can."""

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion.settings import MlpSettings
from jobs.experiments.settings import TrackingSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.followers.start import machine_of
from jobs.runtime.world import start
from jobs.storage import checkpoints
from jobs.storage.ownership import Ownership, Superseded
from jobs.storage.records import Metrics, Tail, read_jsonl
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.train.loop import take_over
from jobs.train.recorder import SPARED_S, RunRecorder, pace
from jobs.train.state import Training
from tests.disturbances import fill_up, small_disk
from tests.launching import wait_until


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, the file system stands still at the end of a checkpoint."""
    moves, sync = threading.Event(), checkpoints.sync_folder

    def slow(folder: Path) -> None:
        assert moves.wait(60)
        sync(folder)

    monkeypatch.setattr(checkpoints, "sync_folder", slow)
    monkeypatch.setattr(checkpoints, "SLOW_S", 0.0)
    return moves


@contextmanager
def recorded(folder: Path, **train: int) -> Iterator[tuple[Training, RunRecorder]]:
    """A small training and its recorder."""
    preset = EXPERIMENTS["1d"].preset
    config = replace(
        preset,
        model=MlpSettings(dim=8, layers=1),
        train=replace(preset.train, **{"batch_size": 16, "keep_checkpoints": 20, **train}),  # type: ignore[arg-type]
        tracking=TrackingSettings(mode="disabled"),
    )
    run = RunFolder(folder)
    run.create("1d", config, {"wandb_id": "a"}, lambda code: code.mkdir())
    training = Training(config.build(), config.train, start(1, "cpu", "fp32"))
    alone = machine_of([("here", None)], 0)
    assert alone is not None
    recorder = RunRecorder(run, training, Ownership.take(run.path), Console(run.log), False, {}, alone)
    try:
        yield training, recorder
    finally:
        recorder.close()


def test_a_regular_checkpoint_does_not_wait_for_one_that_is_on_its_way(
    moves: threading.Event, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(tmp_path / "a", steps=20, checkpoint_every=2) as (training, recorder):
        for _ in range(7):  # steps 4 and 6 are due while the checkpoint of step 2 stands still
            training.update()
            recorder.after_step(None)
        assert recorder._writer.newest == 0
        assert capsys.readouterr().out.count("training goes on") == 1
        moves.set()
        recorder.save()  # waits, as at the end of a job
        folder = tmp_path / "a" / "checkpoints"
        assert checkpoints.steps(folder) == [7, 2]
        assert checkpoints.newest(folder, pytest.fail) == 7


def test_what_is_late_is_saved_at_the_next_step_that_can(moves: threading.Event, tmp_path: Path) -> None:
    """Not only at the next multiple: a cadence of hours would lose hours."""
    with recorded(tmp_path / "a", steps=200, checkpoint_every=50) as (training, recorder):
        for step in (50, 100):  # that of step 100 is due, and cannot begin
            training.step = step - 1
            training.update()
            recorder.after_step(None)
        moves.set()
        wait_until(lambda: not recorder._writer.is_busy(pytest.fail))
        training.update()
        recorder.after_step(None)
        recorder._writer.wait()
        assert checkpoints.steps(tmp_path / "a" / "checkpoints") == [101, 50]


def test_lines_are_on_the_disk_before_the_checkpoint_that_covers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", sync)
    with recorded(tmp_path / "a", steps=20, checkpoint_every=1) as (training, recorder):
        training.update()
        recorder.after_step({"loss": 0.5})
        recorder._writer.wait()
    assert synced.index("metrics.jsonl") < synced.index("model.safetensors")


def test_lines_that_a_full_disk_has_torn_are_whole_when_it_has_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=2) as disk, recorded(disk / "a", steps=99) as (training, recorder):
        filler, loss = disk / "filler", 1 / 3
        for step in range(1, 99):
            if step == 3:
                fill_up(filler)
            if step == 95:
                filler.unlink()
            training.step = step
            recorder._status._beat = 0.0  # a heartbeat is due
            recorder.after_step({"loss": loss, "note": "x" * 99})
        recorder.save()
        written = [json.loads(line) for line in recorder._run.metrics.read_text().splitlines()]
        assert [line["step"] for line in written] == list(range(1, 99))
        assert recorder._run.read_status()["step"] == 98
        words = "No space left on device; it is written when it can be"
        assert capsys.readouterr().out.count(words) == 1
        for step in (98, 99):
            if step == 99:
                fill_up(filler)
            recorder._status._beat = recorder._metrics._pause_until = 0.0
            training.step = step
            recorder.after_step({"loss": loss, "note": "x" * 4096})
        assert capsys.readouterr().out.count(words) == 1  # once for each outage


def test_a_disk_that_fails_for_long_ends_a_job_and_one_that_is_full_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.ESTALE

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with recorded(tmp_path / "a", steps=20) as (_, recorder):
        for method, place, name in (("after_step", Ownership, "check"), ("_save", Metrics, "sync")):
            with monkeypatch.context() as disk:
                disk.setattr(place, name, fail)
                call = partial(getattr(recorder, method), *([{"loss": 0.5}] if method == "after_step" else []))
                for number in (errno.ESTALE, errno.ESTALE, errno.EDQUOT, errno.ENOSPC, errno.EIO):  # by `fail`
                    recorder._status._beat = 0.0
                    call()
                    assert recorder._failing
                    if number != errno.ENOSPC:  # a disk that was full until now has just begun to fail
                        long_ago = time.monotonic() - SPARED_S
                        recorder._failing = {name: (long_ago, tries) for name, (_, tries) in recorder._failing.items()}
                with pytest.raises(OSError, match="Input/output"):
                    call()
            assert not recorder._metrics._pause_until
            call()
            recorder._writer.wait()
            recorder._failing.pop("status", None)
            assert not recorder._failing


def test_lines_that_are_found_lost_when_others_are_written_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a write may say of earlier ones that the disk was full."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add({"step": 1})
    metrics.sync()
    metrics.add({"step": 2})
    metrics.write()
    file = metrics._file

    def lose(*arguments: object) -> None:
        file.truncate(metrics._synced)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics.add({"step": 3})
    with monkeypatch.context() as disk:
        disk.setattr(metrics, "_file", SimpleNamespace(seek=lose))
        with pytest.raises(OSError, match="No space"):
            metrics.write()
    metrics.add({"step": 4})
    with monkeypatch.context() as disk:  # takes a few bytes at a time, as one that is almost full
        disk.setattr(metrics, "_file", SimpleNamespace(seek=file.seek, write=lambda lines: file.write(lines[:5])))
        metrics.write()
    metrics.sync()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    metrics.close()


def test_a_start_that_stood_still_touches_nothing_of_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds out as late as possible: while it verified checkpoints, and before it cuts lines."""
    with recorded(tmp_path / "a", steps=20) as (training, recorder):
        run, owner = recorder._run, Ownership.take(tmp_path / "a")
        for step in (10, 20):
            (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)

        def stand_still(*arguments: object) -> int:
            Ownership.take(run.path)
            return 10

        with monkeypatch.context() as slow:
            slow.setattr(checkpoints, "newest", stand_still)
            with pytest.raises(Superseded):
                take_over(training, run, Console(run.log))
        assert checkpoints.steps(run.checkpoints) == [20, 10]
        run.metrics.write_text('{"step": 1}\n')
        alone = machine_of([("here", None)], 0)
        assert alone is not None
        with pytest.raises(Superseded):
            RunRecorder(run, training, owner, Console(run.log), False, {}, alone)
        assert run.metrics.read_text() == '{"step": 1}\n'


def test_lines_that_wait_are_tried_at_times_and_a_reader_meets_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, tail, read, tries = Metrics(tmp_path / "metrics.jsonl", 0), Tail(tmp_path / "metrics.jsonl"), [], 0

    def full(*arguments: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = metrics._file
    for step in range(1, 50):
        metrics.add({"step": step})
        if step == 10:  # takes half a line, then none
            file.seek(metrics._synced + metrics._written)
            metrics._written += file.write(b'{"ste')
            monkeypatch.setattr(metrics, "_file", SimpleNamespace(seek=full))
        if metrics.is_due():
            with suppress(OSError):
                metrics.write()
        read += tail.read()
    assert tries == 1
    monkeypatch.setattr(metrics, "_file", file)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        metrics.sync()
    metrics.add({"step": 50})
    metrics.write()
    read += tail.read()
    assert [line["step"] for line in read] == list(range(1, 51))
    metrics.close()


@dataclass(frozen=True)
class Requeued:
    """Has queued the job again under this id."""

    job_id: str

    def __call__(self) -> str:
        return self.job_id

    def had_its_time(self) -> bool:
        return True


def test_a_job_that_is_queued_again_while_the_disk_is_full_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=2) as disk, recorded(disk / "a", steps=9) as (training, recorder):
        recorder._run.add_job("job_ids", "7")
        training.step = 1
        fill_up(disk / "filler")
        assert recorder.queue_again(Requeued("7"), "Saved.")
        assert "Saved. It is queued again as job 7." in capsys.readouterr().out
        monkeypatch.setattr("time.sleep", lambda seconds: (disk / "filler").unlink())
        assert recorder.queue_again(Requeued("8"), "Saved.")
        assert recorder._run.read_launch()["job_ids"] == ["7", "8"]


def test_no_checkpoint_is_written_before_its_lines_and_what_the_disk_has_lost_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def lose(descriptor: int) -> None:
        """Fails once, as a network file system does that has had no room for what it had accepted."""
        if os.readlink(path := f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            monkeypatch.setattr(os, "fsync", sync)
            size = os.path.getsize(path)
            with open(path, "r+b") as file:
                file.write(bytes(size))
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(descriptor)

    with recorded(tmp_path / "a", steps=20, checkpoint_every=2) as (training, recorder):
        monkeypatch.setattr(os, "fsync", lose)
        for step in (1, 2, 3):
            training.update()
            recorder.after_step({"loss": 0.5})
            if step == 2:
                assert checkpoints.steps(recorder._run.checkpoints) == []
        recorder.save()
        assert checkpoints.steps(recorder._run.checkpoints) == [3]
        assert [line["step"] for line in read_jsonl(recorder._run.metrics)] == [1, 2, 3]
        assert b"\0" not in recorder._run.metrics.read_bytes()


@pytest.mark.parametrize(
    ("asked", "cpu", "gpu"),
    [
        ({}, ({1000}, 10), (set(), 1)),
        ({"checkpoint_every": 50}, ({50}, 10), ({50}, 10)),
        ({"checkpoint_minutes": 5.0, "keep_every": 300}, ({1000}, 5), ({300}, 5)),
        ({"evaluate_every": 400, "keep_every": 300}, ({1000}, 10), ({300, 400}, 1)),
    ],
)
def test_a_gpu_saves_by_minutes_unless_it_is_told_after_how_many_steps(
    asked: dict[str, Any], cpu: tuple[set[int], float], gpu: tuple[set[int], float]
) -> None:
    settings = replace(EXPERIMENTS["mnist"].preset.train, **asked)
    assert pace(settings, torch.device("cpu")) == cpu
    assert pace(settings, torch.device("cuda:0")) == gpu


def test_minutes_count_from_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that dies in each of its starts would seem to get somewhere, if only compiling takes long enough."""
    with recorded(tmp_path / "a", steps=100) as (training, recorder):
        monkeypatch.setattr(recorder, "_due_after", (set(), 5.0))
        recorder._saved_at -= 600  # compiling has taken ten minutes
        recorder.begin(600.0)
        training.update()
        recorder.after_step(None)
        recorder._writer.wait()
        assert checkpoints.steps(recorder._run.checkpoints) == []
        recorder._saved_at -= 600
        training.update()
        recorder.after_step(None)
        recorder._writer.wait()
        assert checkpoints.steps(recorder._run.checkpoints) == [2]
