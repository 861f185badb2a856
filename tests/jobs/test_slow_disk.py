"""A file system that stands still: training goes on, and saves when it can."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.settings import MlpSettings
from jobs.experiments.settings import TrackingSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.followers.start import machine_of
from jobs.runtime.world import start
from jobs.storage import checkpoints
from jobs.storage.ownership import Ownership
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.train.recorder import RunRecorder, pace
from jobs.train.state import Training
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
