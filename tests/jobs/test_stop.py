"""Signals become requests to stop, of which the strongest holds."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.audit.plan import Audit
from jobs.runtime import job
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.storage import checkpoints
from tests.launching import NO_FIGURES, ROOT, TINY, done, finish, start, status, steps_logged, wait_until

TWO_CTRL_CS = """
import signal, sys
from jobs.runtime.signals import SignalWatch, Stop
with SignalWatch() as signals:
    signal.raise_signal(signal.SIGINT)
    assert signals.requested is Stop.INTERRUPT
    print("goes on")
    sys.stdout.flush()
    signal.raise_signal(signal.SIGINT)
    print("and on")
"""


def test_the_first_ctrl_c_is_a_request_and_the_second_ends_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", TWO_CTRL_CS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, "goes on\n"), ended
    assert "Ended at once" in ended.stderr


def test_the_strongest_reason_holds_whatever_comes_first() -> None:
    with SignalWatch() as signals:
        assert signals.requested is Stop.NO
        for number, reason in (
            (signal.SIGUSR1, Stop.REQUEUE),
            (signal.SIGTERM, Stop.TERMINATE),
            (signal.SIGUSR2, Stop.TERMINATE),
            (signal.SIGHUP, Stop.INTERRUPT),
            (signal.SIGHUP, Stop.INTERRUPT),
            (signal.SIGTERM, Stop.INTERRUPT),
        ):
            signal.raise_signal(number)
            assert signals.requested is reason


def test_nohup_holds() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.requested is Stop.NO
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_closed_terminal_saves(processes: int, tmp_path: Path) -> None:
    where = ("--device", "cpu", "--gpus", processes)
    process = start("train", "1d", *TINY, "--train.steps", 1000000, "--name", "a", *where, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    process.send_signal(signal.SIGHUP)
    assert finish(process, timeout_s=60).code == 130
    assert status(run)["state"] == "interrupted"
    assert checkpoints.steps(run / "checkpoints")[0] == status(run)["step"]


def test_a_job_that_gets_nowhere_is_queued_again_unless_it_has_had_two_whole_time_limits(tmp_path: Path) -> None:
    """As on Slurm, with the answers of its `requeue`: a preemption is not the run's fault, however often it comes."""
    done("train", "1d", *TINY, "--train.steps", "2", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    for path in (run / "checkpoints").iterdir():
        path.rename(run / path.name)
    ended = []
    cancelled, preempted, out_of_time = ("", "preempted"), ("17", "preempted"), ("17", "limit")
    for answers in (cancelled, preempted, preempted, preempted, out_of_time, preempted, out_of_time):
        process = finish(start(run, *answers, cwd=ROOT, module="tests.jobs.warned"))
        ended.append((process.code, status(run)["state"]))
        assert ("It is queued again as job 17." in process.out) == (process.code == 0)
    assert ended == [(130, "interrupted"), *5 * [(0, "requeued")], (1, "failed")]
    assert "no progress in two whole time limits: both times the job had to stop at step 0" in process.err
    assert json.loads((run / "launch.json").read_text())["job_ids"] == ["17"]


class Stopping(job.IndependentJob):
    """Is stopped by a signal in the middle of its work."""

    def __init__(self, target: Audit, number: signal.Signals) -> None:
        self.target, self._number = target, number

    def work(self, signals: SignalWatch) -> int:
        signal.raise_signal(self._number)
        raise Stopped


def test_a_share_that_comes_back_as_another_job_is_found_under_its_new_id(tmp_path: Path) -> None:
    target = Audit(tmp_path, tmp_path, ())
    target.add_job("17")
    for number, comes_back_as in ((signal.SIGTERM, "17_1"), (signal.SIGUSR2, "18_1"), (signal.SIGTERM, "18_1")):
        assert Stopping(target, number)(lambda job_id=comes_back_as: job_id) == 0  # type: ignore[arg-type]
    assert Stopping(target, signal.SIGINT)(lambda: "19_1") == 130  # type: ignore[arg-type]
    assert target.job_ids() == ["17", "18_1"]
