"""The quality of checkpoints is judged beside a training: each once, the last one always, and nothing outlives it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from diffusion.gaussian1d import distances
from diffusion.settings import SettingsError
from jobs.evaluate import beside
from jobs.experiments.table import EXPERIMENTS
from jobs.followers.start import FollowerProcess, machine_of
from jobs.report import curves
from jobs.storage import checkpoints
from jobs.storage.ownership import Ownership
from jobs.storage.records import read_jsonl
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.train import recorder as recording
from jobs.train.recorder import RunRecorder
from jobs.watch import detail
from tests.jobs.test_slow_disk import recorded
from tests.launching import NO_FIGURES, ROOT, done

JUDGE = "tests.jobs.prompt_judge"
pytestmark = pytest.mark.processes


def test_checkpoints_are_judged_beside_the_training_and_not_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recording, "JUDGE", JUDGE)
    monkeypatch.setattr(recording, "LAST_S", 600.0)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    with recorded(run.path, steps=11, checkpoint_every=2, evaluate_every=4, keep_checkpoints=2) as (training, recorder):
        for step in range(1, 12):
            training.update()
            recorder.after_step(None)
            if step % 2 == 0:
                recorder.save()  # waits for the disk, so that each step's checkpoint is there at the next step
        recorder.save()
        recorder._wait_for_judge(lambda: False)
    lines = read_jsonl(run.quality)
    steps = [line["step"] for line in lines]
    # Step 4 waits for torch while 6, 8 and 10 are saved and only two are kept; 8 is judged if 4 is done by then.
    assert steps[0] == 4 and steps[-1] == 11 and steps == sorted(set(steps) & {4, 8, 10, 11})
    manifest = checkpoints.verify(run.checkpoints, 11)
    assert lines[-1]["weights_sha256"] == manifest["files"][checkpoints.EMA]["sha256"]
    # The same samples, drawn by the command.
    done("sample", run.path, "--num-samples", 1000, "--steps", 20, "--name", "same", cwd=tmp_path, **NO_FIGURES)
    samples = torch.from_numpy(np.load(run.samples / "same" / "samples.npz")["arr_0"])
    found = lines[-1]["metrics"]["w1"]
    assert found["value"] == pytest.approx(distances.wasserstein1(samples, training.experiment.mixture), rel=1e-4)
    assert found["low"] <= found["value"] <= found["high"]
    told = detail.describe(run, None)
    assert told["quality"] == lines[-1]
    assert f"{found['label']} {found['value']:.4f}" in detail.render(told, 1000)
    assert [point.value for point in curves.qualities(lines)[found["label"]][curves.JUDGED]][-1] == found["value"]
    # A new start drops what is later than its checkpoint, and judges nothing again.
    with run.quality.open("a") as file:
        file.write(json.dumps({**lines[-1], "step": 50}) + "\n")
    machine = machine_of([("here", None)], 0)
    assert machine is not None
    again = RunRecorder(run, training, Ownership.take(run.path), Console(run.log), False, {}, machine)
    again._wait_for_judge(lambda: False)
    again.close()
    assert read_jsonl(run.quality) == lines
    # A run that was begun when the experiment had another sampler keeps it, or its curve would have a step.
    older = {"sampler": "ddim", "steps": 5, "eta": 0.5}
    run.quality.write_text(json.dumps({**lines[0], "sampler": older}) + "\n")
    rests = Mock(wraps=beside.unhurried)
    monkeypatch.setattr(beside, "unhurried", rests)
    assert beside.judge(run, 11)["sampler"] == older
    rests.assert_called_once()


def test_a_judge_ends_with_its_training_and_says_what_it_could_not_judge(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=2) as (training, recorder):
        training.update()
        recorder.save()
        command = [sys.executable, "-m", JUDGE, str(tmp_path / "a"), recorder._owner.token]
        pipe = subprocess.PIPE
        orphan = subprocess.Popen([*command, "1"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, text=True)
        with subprocess.Popen([*command, "7"], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as of_a_deleted_one:
            assert orphan.communicate()[0] == ""  # its stdin has ended, as where a training was killed
            assert orphan.returncode == 0
            assert of_a_deleted_one.stdout is not None
            assert (
                of_a_deleted_one.stdout.read()
                == "WARNING: step 7 was not judged: its checkpoint is not kept any more\n"
            )
        assert not (tmp_path / "a" / "quality.jsonl").exists()


@pytest.mark.parametrize(
    ("took_s", "computed_s", "rested"), [(1.0, 1.0, []), (1.0, 0.25, [2.0]), (3600.0, 0.25, [beside.LONGEST_REST_S])]
)
def test_a_judge_rests_where_others_want_its_core(
    monkeypatch: pytest.MonkeyPatch, took_s: float, computed_s: float, rested: list[float]
) -> None:
    """So long on the clock, of which it had its core for as long as it computed."""
    clock = {"monotonic": 0.0, "thread_time": 0.0}
    slept: list[float] = []

    def evaluate(x: int) -> int:
        clock["monotonic"] += took_s
        clock["thread_time"] += computed_s
        return x + 1

    time = SimpleNamespace(**{name: lambda name=name: clock[name] for name in clock}, sleep=slept.append)
    monkeypatch.setattr(beside, "time", time)
    assert beside.unhurried(evaluate)(1) == 2
    assert slept == rested


def test_a_judge_that_dies_is_missed() -> None:
    said: list[str] = []
    judge = FollowerProcess("tests.none_of_this_name", [], said.append)
    assert judge.has_ended(within_s=60)
    assert judge.has_ended()
    assert said == ["WARNING: tests.none_of_this_name has ended before its work was done: 1"]


def test_a_signal_ends_the_wait_for_the_last_judgement(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=2, evaluate_every=1) as (training, recorder):
        training.update()
        training.update()
        recorder.save()
        recorder._wait_for_judge(lambda: True)
        assert recorder._judge is not None
        assert recorder._judge.has_ended(within_s=60)
    assert "The last step was not judged" in (tmp_path / "a" / "log.txt").read_text()
    assert not (tmp_path / "a" / "quality.jsonl").exists()


def test_a_judged_metric_without_a_floor_or_an_interval_is_shown() -> None:
    whole = {"label": "W1", "value": 0.25, "low": 0.125, "high": 0.5, "floor": 0.0625}
    bare = {"label": "KL", "value": 0.75, "low": None, "high": None, "floor": None}
    shown = detail._quality({"step": 1000, "metrics": {"w1": whole, "kl": bare}})
    assert shown == ["step 1,000", "W1 0.2500 (0.1250 to 0.5000)", "floor 0.0625", "KL 0.7500"]


def test_only_what_can_be_judged_within_seconds_is() -> None:
    preset = EXPERIMENTS["fashion-mnist-small"].preset
    with pytest.raises(SettingsError, match="is for 1d and digits"):
        replace(preset, train=replace(preset.train, evaluate_every=1))
