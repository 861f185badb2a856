"""Signals that ask a job to stop."""

import os
import signal
from contextlib import suppress
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any


class Stop(IntEnum):
    """Why to stop. If there are several reasons, the largest one counts."""

    NO = 0
    REQUEUE = 1
    """USR1 or USR2: the time limit is near or somebody else needs the node. Save and queue again."""
    TERMINATE = 2
    """SIGTERM: cancelled, or preempted. Save; on Slurm also queue again, as Slurm does not if a job ends by itself."""
    INTERRUPT = 3
    """Ctrl-C, or the terminal is gone (SIGHUP). Save."""


class Stopped(Exception):
    """A signal has asked an independent job to stop; the part that it was working on will be done again."""


SIGNALS = {
    signal.SIGUSR1: Stop.REQUEUE,
    signal.SIGUSR2: Stop.REQUEUE,
    signal.SIGTERM: Stop.TERMINATE,
    signal.SIGINT: Stop.INTERRUPT,
    signal.SIGHUP: Stop.INTERRUPT,
}


class SignalWatch:
    """While entered, signals set `requested` instead of ending the process, and may come again without harm.

    Only a second Ctrl-C ends the process at once, because a person at the terminal insists.
    """

    def __init__(self) -> None:
        self.requested = Stop.NO
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalWatch":
        # nohup has it ignored, and then a terminal that closes is no reason to stop.
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS.keys() - nohup}
        # On Slurm they are held back until now (slurm/shield.py).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == Stop.INTERRUPT:
            # Not through sys.stderr: the next Ctrl-C may interrupt its write, and a stream takes no second one then.
            with suppress(OSError):  # nobody may be reading
                os.write(2, b"\nEnded at once; the last finished checkpoint is intact.\n")
            os._exit(130)
        # Nothing more: a handler runs between any two operations of the training, whose step has to end first.
        self.requested = max(self.requested, SIGNALS[signal.Signals(number)])
