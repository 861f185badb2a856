"""Sends what wandb holds offline, from a machine with a network: the segments of a run in order.

A run has one segment for each start, and wandb appends a segment to those that the server has already. So each is sent
once, when it is complete, or while it is written by a process that follows it. The segment of a job that was killed
while it was followed is sent again, since nobody knows how far that process was; its rows have the same numbers.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from diffusion.errors import OutsideError
from jobs.storage.run_folder import RunFolder
from jobs.tracking.server import address, why_not_online, wrong_variables

Say = Callable[[str], None]

LOOK_S = 15.0
"""Seconds between two looks at runs that are sent while they go on."""
FRESH_S = 60.0
"""A segment that has not changed for so many seconds is complete."""


def check_server() -> None:
    """Raises OutsideError if wandb's server does not answer from here or does not know us, or wandb would not start."""
    os.environ.pop("WANDB_MODE", None)  # what is meant for jobs would keep wandb from sending
    if wrong := wrong_variables():
        raise OutsideError(f"nothing can be sent: wandb does not take the value of {', '.join(wrong)}")
    if (problem := why_not_online(address())) is not None:
        raise OutsideError(f"nothing can be sent: {problem}")


def segments(run: RunFolder) -> list[Path]:
    """Returns wandb's files of what was tracked offline, oldest first: training, samples and evaluations."""
    launch = run.read_launch()
    # A copy of a folder also holds those of its original, whose curve they would lengthen once more.
    own = launch.get("wandb_id", "of-no-run" if launch else "")
    # The folders' names begin with the time of their start.
    return sorted(run.path.glob(f"wandb/offline-run-*/run-{own}*.wandb"))


def others(run: RunFolder) -> list[Path]:
    """Those that are not the run's and are unsent: of the run that it was copied from, or of a launch.json now lost."""
    there = set(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    return sorted(segment for segment in there.difference(segments(run)) if not is_sent(segment))


def why_nothing(run: RunFolder) -> str:
    """How a run was tracked that has no such files."""
    if any(run.path.glob("wandb/run-*")):
        return "tracked online, so wandb has it already"
    return "not tracked (--tracking.mode disabled, or WANDB_MODE=disabled)"


def is_sent(segment: Path) -> bool:
    """Whether wandb has sent the segment; then it leaves this file beside it."""
    return segment.with_name(f"{segment.name}.synced").exists()


def sync(run: RunFolder, is_alive: bool, say: Say) -> None:
    """Sends what has not been sent yet, in order, apart from segments that are still being written."""
    written = _training(run) if is_alive else None
    # What a killed job has left is sent as it is; what somebody still writes would be sent without its end.
    held_back = {written} | {s for s in segments(run) if is_alive and _is_fresh(run, s)}
    unsent = [segment for segment in segments(run) if segment not in held_back and not is_sent(segment)]
    for done, segment in enumerate(unsent):
        say(f"{run}: sending segment {done + 1} of {len(unsent)}.")
        _send(segment)


def sync_live(runs: Sequence[RunFolder], is_alive: Callable[[RunFolder], bool], say: Say) -> None:
    """Sends runs while they go on, over restarts, until none of them lives."""
    sending: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        while True:
            living = {run: _training(run) for run in runs if is_alive(run)}
            for segment in set(sending) - set(living.values()):
                # Its job may have died and left it without an end, for which wandb would wait.
                _stop(sending.pop(segment))
            for run in runs:
                sync(run, run in living, say)
            if not living:
                return
            for segment in filter(None, living.values()):
                if segment not in sending and not is_sent(segment):
                    say(f"Sending {segment.parent} while it is written.")
                    sending[segment] = _start(segment, "beta", "sync", "--live", str(segment.parent))
                elif segment in sending and sending[segment].poll() not in (None, 0):
                    raise OutsideError(f"`wandb beta sync --live {segment.parent}` fails: leave out --live")
            time.sleep(LOOK_S)
    finally:
        for process in sending.values():
            _stop(process)


def _training(run: RunFolder) -> Path | None:
    """The newest segment of the training itself, which a living run writes."""
    name = _name_of_training(run)
    return next((segment for segment in reversed(segments(run)) if segment.name == name), None)


def _name_of_training(run: RunFolder) -> str:
    return f"run-{run.read_launch().get('wandb_id')}.wandb"


def _is_fresh(run: RunFolder, segment: Path) -> bool:
    """Whether it may be what a sampling or an evaluation beside the training is writing."""
    return segment.name != _name_of_training(run) and time.time() - segment.stat().st_mtime < FRESH_S


def _send(segment: Path) -> None:
    process = _start(segment, "sync", str(segment.parent))
    try:
        code = process.wait()
    finally:
        _stop(process)
    # The exit code may be 0 after an error that wandb has only printed.
    if code != 0 or not is_sent(segment):
        raise OutsideError(f"wandb could not send {segment.parent}; its own words: wandb sync {segment.parent}")


def _start(segment: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts wandb's command, which keeps its own logs beside the segments."""
    return subprocess.Popen(
        [sys.executable, "-m", "wandb", *arguments],
        env={**os.environ, "WANDB_DIR": str(segment.parent.parent.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A process group of its own, so that `_stop` reaches wandb's children and not us.
        start_new_session=True,
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends wandb's command and the process that works for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
