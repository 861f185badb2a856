"""Shared by the processes that follow a job: they run until their stdin closes, and at most `END_S` longer."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jobs.storage.run_folder import RunFolder
from jobs.tracking.dashboard import Dashboard, first_line, open_dashboard
from jobs.tracking.identity import of_part
from jobs.tracking.server import public

LOOK_S = 1.0
END_S = 25.0
"""A follower may outlive its job by so many seconds."""
ATTEMPTS = 3
"""A follower starts so often in all if wandb breaks, for example when a signal has ended wandb's own process."""
TEMPORARY = "tracking-"
"""What the name of a follower's folder for temporary files begins with."""


class Followed(Protocol):
    """What follows a job: it looks at the files again and again. Both methods may raise whatever wandb raises."""

    def look(self) -> None:
        """Passes on what is new."""

    def end(self) -> None:
        """Passes on the rest, after the job has ended."""


def say(text: str) -> None:
    """Prints what the job relays to its terminal and log."""
    with contextlib.suppress(OSError):  # the job may be gone
        print(public(text), flush=True)


def open_part(run: RunFolder, part: str, job_type: str, config: Mapping[str, Any]) -> Dashboard:
    """Opens the dashboard of a part of a run, such as a set of samples."""
    _, settings = run.read_experiment()
    return open_dashboard(of_part(run, part, job_type, config), settings.tracking.mode, say)


def follow(start: Callable[[int], Followed]) -> None:
    """Looks every second until the job has ended, then ends within `END_S`; `start` gets the number of the attempt."""
    attempt = int(os.environ.pop("FOLLOWER_ATTEMPT", "1"))
    # Niceness is added up, and a new attempt keeps it.
    if attempt == 1:
        os.nice(10)
    use_own_temporary_folder()
    ended = threading.Event()
    threading.Thread(target=_watch_stdin, args=(ended,), daemon=True).start()
    try:
        followed = start(attempt)
        while not ended.wait(LOOK_S):
            followed.look()
        followed.end()
    except Exception as error:
        _kill_children()
        os.environ.pop("WANDB_SERVICE", None)  # the address of what has just been killed
        if attempt < ATTEMPTS:
            os.environ["FOLLOWER_ATTEMPT"] = str(attempt + 1)
            _remove_temporary_folder()
            # Not in this interpreter, where wandb's module still holds the broken connection. An exec keeps the pipes.
            os.execv(sys.executable, sys.orig_argv)
        say(f"Tracking has stopped, the next start sends the rest ({first_line(error)})")
        ended.wait()
    leave()


def _watch_stdin(ended: threading.Event) -> None:
    """Waits for the end of stdin, which is the job's end: the job keeps it open and writes nothing."""
    while os.read(0, 1):
        pass
    ended.set()
    time.sleep(END_S)
    say("Tracking could not be completed in time; the next start sends the rest.")
    leave()


def use_own_temporary_folder() -> None:
    """Before wandb is imported, which makes folders: `leave` removes them, as it runs no exit handler of wandb's."""
    with contextlib.suppress(OSError):  # where disks are full, people must be told all the more
        tempfile.tempdir = tempfile.mkdtemp(prefix=TEMPORARY)


def leave() -> None:
    """Ends this process and wandb's at once; wandb's own way to end would wait for a server for ever."""
    _kill_children()
    _remove_temporary_folder()
    os._exit(0)


def _remove_temporary_folder() -> None:
    folder = Path(tempfile.tempdir or "")  # not gettempdir, which raises OSError where all disks are full
    if folder.name.startswith(TEMPORARY):
        shutil.rmtree(folder, ignore_errors=True)


def _kill_children() -> None:
    # Each thread has children of its own, and wandb may start its process from any of them.
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
