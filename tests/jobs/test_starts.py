"""Who starts a run, under which name, and how often: no two commands train one run, and nobody is locked out."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from commands.train import NameTaken, is_finished, run_training
from commands.where import Launch
from jobs.experiments.table import EXPERIMENTS
from jobs.files import write_json
from jobs.storage import checkpoints
from jobs.storage.checkpoints import Snapshot
from jobs.storage.records import now
from jobs.storage.run_folder import RunFolder
from tests.launching import (
    NO_FIGURES,
    TINY,
    as_if_drawn,
    done,
    finish,
    launch,
    sentence,
    start,
    status,
    steps_logged,
    wait_until,
)

ENDLESS = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a")


def test_runs_started_in_one_second_are_runs_of_their_own(tmp_path: Path) -> None:
    tiny = ("train", "1d", *TINY, "--train.steps", 20, "--device", "cpu", "--cluster", "local")
    started = [start(*tiny, "--train.seed", seed, cwd=tmp_path, **NO_FIGURES) for seed in range(4)]
    assert [finish(process).code for process in started] == [0, 0, 0, 0]
    runs = sorted((tmp_path / "runs" / "1d").iterdir())
    seeds = [json.loads((run / "experiment.json").read_text())["train"]["seed"] for run in runs]
    assert sorted(seeds) == [0, 1, 2, 3]
    assert {status(run)["restarts"] for run in runs} == {0}


def test_a_name_that_another_command_has_just_taken_is_not_continued(tmp_path: Path) -> None:
    config, run = EXPERIMENTS["1d"].preset, RunFolder(tmp_path / "1d" / "a")
    run.create("1d", config, {"wandb_id": "0000abcd"}, lambda code: code.mkdir())
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    where = Launch(cluster="local", device="cpu", runs_dir=tmp_path)
    other = replace(config, train=replace(config.train, seed=1))
    with pytest.raises(NameTaken, match="has just been made by another command"):
        run_training(run, "1d", other, where, is_new=True)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert [path.name for path in run.path.parent.iterdir()] == ["a"]


def test_one_name_for_two_settings_at_once_makes_one_run(tmp_path: Path) -> None:
    tiny = ("train", "1d", *TINY, "--train.steps", 20, "--device", "cpu", "--cluster", "local", "--name", "a")
    started = [start(*tiny, "--train.seed", seed, cwd=tmp_path, **NO_FIGURES) for seed in range(4)]
    ended = [finish(process) for process in started]
    assert sorted(end.code for end in ended) == [0, 2, 2, 2]
    (seed,) = (seed for seed, end in enumerate(ended) if end.code == 0)
    run = tmp_path / "runs" / "1d" / "a"
    assert json.loads((run / "experiment.json").read_text())["train"]["seed"] == seed
    assert status(run)["restarts"] == 0


def test_the_same_command_continues_and_other_settings_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    command = ("train", "1d", *TINY, "--train.steps", "50", "--name", "a")
    done(*command, cwd=tmp_path, **NO_FIGURES)
    as_if_drawn(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = done(*command, cwd=tmp_path)
    assert "finished" in again.out
    refused = launch(*command, "--train.lr", "0.5", cwd=tmp_path)
    assert refused.code == 2
    assert "train.lr is 0.004, not 0.5" in sentence(refused.err)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert launch("resume", "1d", "--train.steps", "40", cwd=tmp_path).code == 2
    done("resume", "1d", "--train.steps", "80", cwd=tmp_path, **NO_FIGURES)
    assert status(run)["step"] == steps_logged(run) == 80
    assert status(run)["restarts"] == 1
    (tmp_path / "runs" / "mnist").mkdir()
    run.rename(tmp_path / "runs" / "mnist" / "a")
    misplaced = launch("train", "mnist", "--name", "a", cwd=tmp_path)
    assert misplaced.code == 2
    assert "runs/mnist/a is a run of 1d, not of mnist" in sentence(misplaced.err)


def test_a_run_is_not_finished_without_its_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, preset = RunFolder(tmp_path / "1d" / "a"), EXPERIMENTS["1d"].preset
    run.create("1d", preset, {}, lambda code: code.mkdir())
    write_json(run.status, {"state": "finished", "step": preset.train.steps})
    checkpoints.save(run.checkpoints, Snapshot(preset.train.steps, {}, {}, {}), lambda: None)
    assert is_finished(run, preset)
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(run.checkpoints)
    assert not is_finished(run, preset)
    assert "the steps since the last good one are made again" in capsys.readouterr().err


def test_a_running_run_is_not_started_twice_and_a_dead_one_locks_nobody_out(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    process = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    try:
        wait_until(lambda: steps_logged(run) >= 5)
        second = launch(*ENDLESS, cwd=tmp_path)
        assert second.code == 2
        assert "running already" in sentence(second.err)
    finally:
        process.kill()
        process.communicate()
    third = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    wait_until(lambda: (run / "status.json").exists() and status(run)["restarts"] == 1 and steps_logged(run) >= 5)
    third.send_signal(signal.SIGINT)
    out, _ = third.communicate(timeout=60)
    assert third.returncode == 130
    assert f"resume {run.relative_to(tmp_path)}" in out
    assert status(run)["state"] == "interrupted"


def test_a_run_that_is_at_work_on_another_machine_is_not_started(tmp_path: Path) -> None:
    """By a colleague's job, which Slurm does not list among ours; or here, where there is no Slurm."""
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    before = run.metrics.read_bytes()
    resume = ("resume", "1d/a", "--train.steps", "40")
    at_work = {**run.read_status(), "state": "running", "host": "n7", "on_slurm": True}
    for behind_s in (0, 600, -600):  # so far is its clock behind ours
        write_json(run.status, {**at_work, "updated": now(behind_s)})
        process = start(*resume, cwd=tmp_path)
        while process.poll() is None:  # its heart beats
            write_json(run.status, {**at_work, "updated": now(behind_s)})
            time.sleep(0.1)
        refused = finish(process)
        assert refused.code == 2
        assert f"{run} is at work on n7".replace(f"{tmp_path}/", "") in sentence(refused.err)
        assert run.metrics.read_bytes() == before
    write_json(run.status, {**at_work, "updated": now(28)})  # it has died
    os.utime(run.status, times=2 * (time.time() - 28,))
    done(*resume, cwd=tmp_path, **NO_FIGURES)


def test_a_second_ctrl_c_ends_at_once_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    process = start(*ENDLESS, "--train.checkpoint-every", "50", cwd=tmp_path, **NO_FIGURES)
    wait_until(lambda: checkpoints.steps(run / "checkpoints") != [])
    for _ in range(50):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    newest = checkpoints.newest(run / "checkpoints", print)
    assert newest is not None
    assert newest >= 50
