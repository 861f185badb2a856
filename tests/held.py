"""launch.py, but a process of it stands still at a place that the test names, so that nothing comes too late for it.

$HELD is the place: a function, and how many of its calls come before; the first $HELD_TIMES processes that get there
stand still. A signal that the process handles lets it go on, and so does `let_go`.
"""

import itertools
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from slurm import local
from tests.launching import NO_FIGURES, Process, start, wait_until

AFTER_STEP = "jobs.train.recorder.RunRecorder.after_step"
AFTER_SHARD = "jobs.sample.draw.write_shard"


def start_held(function: str, calls: int, *arguments: object, cwd: Path, times: int = 1, **env: str) -> Process:
    """Starts a command, without figures, that is held after so many calls of the function."""
    for mark in cwd.glob("held-*"):
        mark.unlink()
    place = {"HELD": f"{function} {calls}", "HELD_TIMES": str(times), "HELD_IN": str(cwd)}
    place["WATCHDOG_S"] = "0"  # or the run would be ended as one that hangs
    return start(*arguments, cwd=cwd, module="tests.held", **place, **NO_FIGURES, **env)


def is_held(cwd: Path, number: int = 0) -> bool:
    return (cwd / f"held-{number}").exists()


def held(cwd: Path, number: int = 0) -> int:
    """Waits until a process of the command stands still, and returns its id."""
    wait_until(lambda: is_held(cwd, number))
    return int((cwd / f"held-{number}").read_text())


def let_go(cwd: Path, number: int = 0) -> None:
    os.kill(held(cwd, number), signal.SIGCONT)


def holding() -> AbstractContextManager[object]:
    """While entered, this process stands still at the place, unless enough have done so."""
    function, calls = os.environ["HELD"].split()
    times, folder = int(os.environ["HELD_TIMES"]), Path(os.environ["HELD_IN"])
    original, count = pkgutil.resolve_name(function), itertools.count(1)

    def holds(*arguments: Any, **more: Any) -> Any:
        returned = original(*arguments, **more)
        if next(count) == int(calls):
            for number in range(times):
                with suppress(FileExistsError):  # another process stands there
                    stand_still(folder / f"held-{number}")
                    break
        return returned

    return mock.patch(function, holds)


def stand_still(mark: Path) -> None:
    """Writes this process's id into the file `mark`, which must not be there yet, and waits for a signal."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGCONT, lambda number, frame: None)
    before = signal.set_wakeup_fd(write)  # which misses none that comes before the waiting begins
    try:
        with tempfile.NamedTemporaryFile("w", dir=mark.parent) as own:
            own.write(str(os.getpid()))
            own.flush()
            os.link(own.name, mark)
        os.read(read, 1)
    finally:
        signal.set_wakeup_fd(before)


@dataclass(frozen=True)
class Held:
    """A job that stands still at the place."""

    job: Callable[[], int]

    def __call__(self) -> int:
        with holding():
            return self.job()


def main() -> int:
    import launch
    from tests.held import Held  # as its processes know it

    run = local.run
    with holding(), mock.patch.object(local, "run", lambda job, *rest, **more: run(Held(job), *rest, **more)):
        return launch.main()


if __name__ == "__main__":
    sys.exit(main())
