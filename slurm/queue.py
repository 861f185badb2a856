"""What Slurm knows: whether it is there, which jobs wait or run, and how jobs have ended."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal, NamedTuple


def is_available() -> bool:
    """Whether jobs are better submitted than run here: there is Slurm, and this is no job already."""
    return "SLURM_JOB_ID" not in os.environ and has_slurm()


def has_slurm() -> bool:
    """Whether sbatch exists and the controller answers within two seconds."""
    if shutil.which("sbatch") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return " is UP" in done.stdout


def active(job_ids: Iterable[str]) -> dict[str, str]:
    """Those of the jobs that wait, run or are coming to an end, with their states, such as {"17": "PENDING"}.

    Raises RuntimeError if Slurm does not answer.
    """
    wanted = set(job_ids)
    if not wanted or shutil.which("squeue") is None:
        return {}
    # All of the user's jobs: asked for single ones, squeue fails if it has forgotten one of them.
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"squeue does not answer: {done.stderr.strip()}")
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    # An element of an array is called ARRAY_INDEX.
    return {job_id: state for job_id, state in states.items() if job_id in wanted or job_id.split("_")[0] in wanted}


def max_array_size() -> int:
    """How many elements an array may have (MaxArraySize, whose usual value is 1001)."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else 1001


class JobState(NamedTuple):
    """What Slurm says of a job."""

    state: str
    """In Slurm's words: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, ..."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""
    """Where it runs or has run, such as n[1-2]."""
    signal: str = ""
    """The signal that ended it, if one did."""

    @property
    def phase(self) -> Literal["waiting", "running", "ended"]:
        return "waiting" if self.state in _WAITING else "ended" if self.state in _ENDED else "running"


_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


def look(job_ids: Iterable[str], timeout_s: float = 5) -> dict[str, JobState]:
    """What Slurm says of the jobs, by id; the id of an array stands for its tasks, "17" for "17_0", "17_1", ...

    squeue knows the jobs of the last minutes (MinJobAge), sacct all others where there is accounting; jobs that neither
    of them knows are left out. Raises RuntimeError if squeue does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    # With sizes, without which squeue cuts at 20 characters. Not --format, which has no exit code.
    columns = "JobArrayID:40|,State:20|,Reason:80|,exit_code:12|,NodeList:400"
    command = ["squeue", "--me", "--states=all", "--array", "--noheader", f"--Format={columns}"]
    found = {}
    for job_id, state, reason, exit_code, nodes in _rows(command, timeout_s):
        why = reason if state in _WAITING and reason != "None" else ""
        found[job_id] = JobState(state, why, nodes, _signal(int(exit_code)))
    found = {job_id: job for job_id, job in found.items() if _stands_for(job_id, wanted)}
    forgotten = wanted - found.keys() - {job_id.partition("_")[0] for job_id in found}
    return {**found, **_recall(forgotten, timeout_s)} if forgotten else found


def warn(job_id: str) -> None:
    """Sends the signal that precedes the time limit or a preemption."""
    _control("scancel", "--signal=USR2", job_id)


def requeue(job_id: str) -> None:
    """Stops a job and puts it back into the queue, as an administrator may."""
    _control("scontrol", "requeue", job_id)


def _control(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} refuses: {done.stderr.strip()}")


def cancel(job_ids: Iterable[str]) -> None:
    """Cancels jobs and whole arrays, waiting and running ones alike. RuntimeError with scancel's words if it cannot."""
    _control("scancel", *job_ids)


def _recall(job_ids: set[str], timeout_s: float) -> dict[str, JobState]:
    """What the accounting remembers of jobs that have ended; {} where there is none or it does not answer."""
    command = ["sacct", "--noheader", "--parsable2", "--format=JobID,State,ExitCode,NodeList"]
    found: dict[str, JobState] = {}
    with suppress(RuntimeError):
        for step_id, words, exit_code, nodes in _rows([*command, f"--jobs={','.join(sorted(job_ids))}"], timeout_s):
            job_id, _, step = step_id.partition(".")
            state, number = words.split()[0], int(exit_code.partition(":")[2])  # CANCELLED by 1000; code:signal
            known = found.get(job_id)
            if known is None:
                found[job_id] = JobState(state, "", nodes.removeprefix("None assigned"), _signal(number))
            elif step and (state == "OUT_OF_MEMORY" or number):  # which the job itself may only call FAILED
                worst = state if state == "OUT_OF_MEMORY" else known.state
                found[job_id] = known._replace(state=worst, signal=_signal(number) or known.signal)
    # What squeue has forgotten has ended, whatever was written down last.
    return {job_id: job for job_id, job in found.items() if job.phase == "ended" and _stands_for(job_id, job_ids)}


def _rows(command: list[str], timeout_s: float) -> list[list[str]]:
    """The lines that a command prints, cut at `|`; raises RuntimeError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} does not answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} does not answer: {done.stderr.strip()}")
    return [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]


def _stands_for(job_id: str, wanted: set[str]) -> bool:
    return job_id in wanted or job_id.partition("_")[0] in wanted


def _signal(status: int) -> str:
    """The signal in what wait(2) says of a process: one of its own, or that of a child of a shell (128 + number)."""
    number = status & 127 or max(0, (status >> 8) - 128)
    try:
        return signal.Signals(number).name if number else ""
    except ValueError:
        return ""
