"""Signals become requests to stop, of which the strongest holds."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from jobs.runtime.signals import SignalWatch, Stop
from tests.launching import ROOT, TINY, done, status

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
            (signal.SIGINT, Stop.INTERRUPT),
            (signal.SIGTERM, Stop.INTERRUPT),
        ):
            signal.raise_signal(number)
            assert signals.requested is reason


WARNED = """
import os, signal, sys
from pathlib import Path
from jobs.train.job import TrainJob
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
os.kill(os.getpid(), signal.SIGUSR2)
sys.exit(TrainJob(Path(sys.argv[1]), 1, "cpu")(lambda: sys.argv[2] or None))
"""


def test_a_job_that_is_warned_is_queued_again_unless_it_gets_nowhere(tmp_path: Path) -> None:
    """As Slurm does it, with the answer of its `requeue`."""
    done("train", "1d", *TINY, "--train.steps", "2", "--name", "a", cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    for path in (run / "checkpoints").iterdir():
        path.rename(run / path.name)
    ended = {}
    for job_id in ("", "17", "17"):
        command = [sys.executable, "-c", WARNED, run, job_id]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        ended[process.returncode] = status(run)["state"], process.stdout, process.stderr
    assert [(code, state) for code, (state, *_) in ended.items()] == [
        (130, "interrupted"),
        (0, "requeued"),
        (1, "failed"),
    ]
    assert "It is queued again as job 17." in ended[0][1]
    assert "no progress between two requeues: both times the job had to stop at step 0" in ended[1][2]
    assert json.loads((run / "launch.json").read_text())["job_ids"] == ["17"]
