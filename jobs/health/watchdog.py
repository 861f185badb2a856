"""Ends a process that makes no progress any more, and keeps the stacks that show where it hangs.

A process that hangs cannot be relied on to notice it: its threads may wait for one lock, or it may be stopped. So
another process looks on (jobs/health/watcher.py), and reads from shared memory what this one is doing.
"""

import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from diffusion.errors import UserError
from jobs.health.watcher import HEADER
from jobs.runtime.signals import SIGNALS

VARIABLE = "WATCHDOG_S"
"""The environment variable that replaces `LEAST_S`, and so changes all patience in proportion; 0 switches it off."""
LEAST_S = 60.0
"""Every step is allowed so many seconds at least."""
USUAL = 10.0
"""A step may take so many times as long as usual."""
START, COMPILING, HELD_OUT, SAVING, FIGURES, DRAWING, UNIT, END = 15, 30, 15, 15, 60, 15, 60, 90
"""How many times `LEAST_S` other work may take.

DRAWING is from one evaluation of a sampler to the next, or to the end of a shard, and UNIT a unit of an evaluation. At
the END, processes wait for the one that saves and draws.
"""
DISK = 15
"""While the run's disk stands still, whatever is done may take so many times `LEAST_S`."""
# A real-time signal, because USR1 and USR2 ask a job to stop (jobs/runtime/signals.py).
DUMP = signal.SIGRTMIN + 7
"""This signal makes a process write the stacks of all its threads, even where Python itself does not run any more."""
SIZE = 4096
"""Bytes of the shared memory: `HEADER`, and then a text."""


class Watchdog:
    """While entered, ends this process if what it is `doing` takes too long, and writes its stacks below `folder`."""

    def __init__(self, folder: Path, advice: str = "") -> None:
        """`advice` is a sentence for whoever sees the process end."""
        self.doing = "the start"
        self._folder, self._advice = folder, advice
        given = os.environ.get(VARIABLE, str(LEAST_S))
        try:
            self._least_s = float(given)
        except ValueError:
            raise UserError(f"{VARIABLE} must be a number of seconds; got {given!r}") from None
        self._beats, self._steps = 0, 0
        self._begun, self._first, self._first_s = time.monotonic(), 0.0, 0.0
        self._memory: mmap.mmap | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Watchdog":
        if self._least_s > 0:
            with suppress(OSError):  # a process too many, say: then nobody looks on
                self._start()
        return self

    def _start(self) -> None:
        # Some Pythons are built for systems without memfd_create.
        shared = os.memfd_create("watchdog") if hasattr(os, "memfd_create") else _without_a_name()
        # The watcher inherits this: Slurm sends these signals to all processes of a job, and none of them is for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            os.ftruncate(shared, SIZE)
            self._memory = mmap.mmap(shared, SIZE)
            self.phase(self.doing, START)
            watcher = Path(__file__).with_name("watcher.py")
            longest_s, terminal = str(DISK * self._least_s), ["at-a-terminal"] if os.isatty(0) else []
            told = [str(shared), str(DUMP), str(self._folder), longest_s, self._advice, *terminal]
            self._watcher = subprocess.Popen(
                # -S leaves out site-packages, which it does not need: it starts faster, and takes less memory.
                [sys.executable, "-S", str(watcher), *told],
                stdin=subprocess.PIPE,
                pass_fds=[shared],
                start_new_session=True,  # Ctrl-C is not for it
            )
        finally:
            os.close(shared)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._watcher.stdin is not None
        # Stacks are written into the pipe at whose end it waits for our end. If nobody reads them, they are dropped.
        os.set_blocking(self._watcher.stdin.fileno(), False)
        faulthandler.register(DUMP, self._watcher.stdin.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.close()
            self._watcher.wait()
            faulthandler.unregister(DUMP)

    def phase(self, doing: str, patience: float) -> None:
        """Says what is done from now on, and how many times `LEAST_S` that may take."""
        self._steps, self._begun = 0, time.monotonic()
        self.between_steps(doing, patience)

    def between_steps(self, doing: str, patience: float) -> None:
        """Says the same of what is done until the step that has begun ends."""
        self._beat(doing, patience * self._least_s)

    def step(self, done: int) -> None:
        """Says that step `done` is done. The first may take long, because much is set up then."""
        now = time.monotonic()
        if self._steps == 0:
            self._first, self._first_s = now, now - self._begun
        # Until a second one is done, the first is all that is known of how long steps take.
        usual_s = (now - self._first) / self._steps if self._steps else self._first_s
        self._steps += 1
        self._beat(f"step {done + 1}", max(self._least_s, USUAL * usual_s))

    def _beat(self, doing: str, patience_s: float) -> None:
        self.doing = doing
        if self._memory is None:
            return
        self._beats += 1
        text = doing.encode()[: SIZE - HEADER.size - 1] + b"\0"
        self._memory[HEADER.size : HEADER.size + len(text)] = text
        HEADER.pack_into(self._memory, 0, self._beats, patience_s)


def _without_a_name() -> int:
    """Returns a descriptor of an empty file that goes with its last descriptor."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
