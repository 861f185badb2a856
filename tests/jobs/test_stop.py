"""Signals become requests to stop, of which the strongest holds."""

import signal
import subprocess
import sys

from jobs.runtime.signals import SignalWatch, Stop
from tests.launching import ROOT

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
