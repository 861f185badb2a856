"""`cancel` ends a run on this machine, with a last checkpoint, and says so."""

import signal
from pathlib import Path

import pytest

from jobs.storage import checkpoints, ownership
from tests.launching import NO_FIGURES, TINY, done, finish, launch, relatives, start, status, steps_logged, wait_until

ENDLESS = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a", "--device", "cpu")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_running_run_is_cancelled_with_a_last_checkpoint(processes: int, tmp_path: Path) -> None:
    training = start(*ENDLESS, "--gpus", processes, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    assert ownership.holders(run) == [training.pid]
    ended = done("cancel", "1d/a", cwd=tmp_path)
    assert finish(training).code == 130
    wait_until(lambda: relatives(training) == [])
    assert status(run)["state"] == "cancelled"
    assert checkpoints.steps(run / "checkpoints")[0] == status(run)["step"]
    assert f"is cancelled; its last checkpoint is of step {status(run)['step']:,} of 1,000,000" in ended.out


def test_processes_that_have_lost_their_parent_are_found(tmp_path: Path) -> None:
    training = start(*ENDLESS, "--gpus", "2", cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    children = [pid for pid in relatives(training) if pid != training.pid]
    training.send_signal(signal.SIGKILL)
    training.wait()
    found = ownership.holders(run)
    assert set(found) <= set(children)
    launch("cancel", "1d/a", cwd=tmp_path)
    wait_until(lambda: relatives(training) == [])
    finish(training)


def test_a_run_that_is_being_started_is_cancelled_too(tmp_path: Path) -> None:
    training = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: ownership.is_locked(run))
    done("cancel", run, cwd=tmp_path)
    assert finish(training).code != 0
    assert ownership.holders(run) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampling_is_cancelled(processes: int, tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    huge = ("sample", "1d/a", "--num-samples", "100000000", "--device", "cpu", "--gpus", processes, "--name", "s")
    sampling = start(*huge, cwd=tmp_path)
    samples = tmp_path / "runs" / "1d" / "a" / "samples"
    wait_until(lambda: any(samples.glob("s/shard-*.npy")))
    ended = done("cancel", "1d/a", cwd=tmp_path)
    assert f"Ending process {sampling.pid}." in ended.out
    assert "runs/1d/a is finished" in ended.out
    assert finish(sampling).code == 130
    wait_until(lambda: relatives(sampling) == [])


def test_a_run_that_is_not_running(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    ended = launch("cancel", "1d/a", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err == "error: runs/1d/a is not running: it is finished\n"
