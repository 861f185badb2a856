"""Reads and follows what a run prints, wherever it runs."""

import codecs
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.storage import ownership
from jobs.storage.job_ids import is_element, log_of
from jobs.storage.run_folder import RunFolder, State, as_typed
from jobs.watch import states

POLL_S = 0.2
LOOK_S = 1.0
"""Seconds between two looks at whether the run is alive."""


def locate(run: RunFolder) -> Path:
    """Returns the file that the run's last job prints into; it may not exist yet."""
    launch = states.read_launch(run)
    job_ids = launch.get("job_ids", [])
    # The lock is held by a training that was started on this machine, never by a job that was submitted.
    if not job_ids or ownership.is_locked(run.path):
        return run.log
    # The elements of a sweep's array print into the sweep's folder.
    submitter = run.path.with_name(launch["sweep"]) if "sweep" in launch and is_element(job_ids[-1]) else run.path
    path = submitter / "slurm" / log_of(job_ids[-1])
    # A run that has moved from Slurm to this machine writes its log alone; on Slurm both files grow together, so a lead
    # of a minute means that the job's own has stopped.
    here_last = path.exists() and run.log.exists() and run.log.stat().st_mtime > path.stat().st_mtime + 60
    return run.log if here_last else path


def title(run: RunFolder) -> str:
    """Says which file it is, or that it does not exist yet."""
    path = locate(run)
    name = as_typed(path)
    if path.exists():
        return f"==> {name}"
    state = states.summarize(run, None).state  # without Slurm's word, but true of a process that was killed here
    yet = " yet" if state in (State.CREATED, *states.UNSETTLED) else ""
    return f"==> {name} is not there{yet}; the run is {state}"


def read(run: RunFolder) -> str:
    """Returns all that the run's last job has printed so far."""
    return _read_from(locate(run), 0)[0] + _failure(run)


def follow(run: RunFolder, is_alive: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str]:
    """Yields the log as it grows, over requeues, until the run has ended; `say` is told which file it is.

    `is_alive` tells whether the run waits or runs somewhere.
    """
    path, position = None, 0
    asked = -LOOK_S
    while True:
        # Ask first, then read: if the run had ended when asked, what is read afterwards is all that it has printed.
        over = False
        if time.monotonic() - asked >= LOOK_S:
            over, asked = not is_alive(), time.monotonic()
        if (found := locate(run)) != path:
            path, position = found, 0
            say(title(run))
        text, position = _read_from(path, position)
        if text:
            yield text
        elif over:
            yield _failure(run)
            return
        time.sleep(POLL_S)


def _failure(run: RunFolder) -> str:
    """Returns what a run that has failed on this machine has printed on the terminal, but not into the log."""
    status = states.read_status(run)
    return f"{status['traceback']}\n" if locate(run) == run.log and status.get("state") == State.FAILED else ""


def _read_from(path: Path, position: int) -> tuple[str, int]:
    """Reads a file from a position on; returns text and new position. A file that was cut is read from the start."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < position:
                position = 0
            file.seek(position)
            content = file.read()
    except FileNotFoundError:
        return "", position
    # Of a character that is written only in part, the next read gets all.
    text, used = codecs.utf_8_decode(content, "replace", False)
    return text, position + used
