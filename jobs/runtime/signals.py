"""Signals that ask a job to stop, and how all its processes agree on the step at which they do."""

import os
import signal
from collections.abc import Callable
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


class StopVote:
    """Lets all processes agree on a reason to stop, without waiting for one another.

    A process that stopped on its own would leave the others waiting in the next all-reduce. So at each step every
    process posts its own reason. The maximum over all is computed while the next step runs, and read one step later:
    all processes read the same value at the same step.
    """

    def __init__(self, reduce_max: "Callable[[int], Callable[[], int]]") -> None:
        self._reduce_max = reduce_max
        self._pending: Callable[[], int] | None = None

    def post_and_read(self, own: Stop) -> Stop:
        """Posts this process's reason; returns the one that all agreed on at the step before."""
        agreed = self.read()
        self._pending = self._reduce_max(own)
        return agreed

    def read(self) -> Stop:
        """Waits for the last vote and returns its result; afterwards no vote is on its way."""
        pending, self._pending = self._pending, None
        return Stop(pending()) if pending is not None else Stop.NO
