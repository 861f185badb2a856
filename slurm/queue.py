"""What Slurm knows of itself and of jobs, and the few things that it is told to do to a job."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, cast

from slurm.errors import SlurmError

FIRST_PAUSE_S = 2.0
LOOK_S = 5.0
"""Seconds that squeue and sacct may take to tell of jobs."""
POLL_S = 60
"""Seconds between questions about a job that goes on, unless a profile says otherwise; administrators ask for that."""

UNREACHED = re.compile("Unable to contact", re.IGNORECASE)
"""Slurm's tools say so if the controller is down."""
AWAY = re.compile(f"{UNREACHED.pattern}|timed out|Zero Bytes", re.IGNORECASE)
"""The same, or the controller is too busy to answer; but it may have done what it was asked for."""
AGAIN_S = 5.0
"""Seconds until it is asked once more."""
PATIENCE_S = 20.0
"""For so long a job asks again. What runs after the job has more time (slurm/after.py)."""


class Unanswered(SlurmError):
    """The controller has not answered a job in time, so nobody knows what it knows, or what it has done."""


def has_slurm(patience_s: float = 2) -> bool:
    """Whether this machine belongs to a Slurm cluster.

    Raises SlurmError if it does and the controller does not answer within `patience_s`: slow is not absent.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        answer = ask("scontrol", "ping", timeout_s=patience_s)
    except OSError as error:
        raise SlurmError(f"scontrol cannot be started: {error.strerror}") from None
    except SlurmError:
        raise SlurmError(f"Slurm does not answer `scontrol ping` within {patience_s:g} s") from None
    if re.search(r"^Slurmctld.* is UP *$", answer.stdout, re.MULTILINE):
        return True
    # Packages that nobody has set up make no cluster: no file and no name server says where one is.
    if "SLURM_CONF" not in os.environ and "configuration source" in answer.stderr:
        return False
    raise SlurmError(f"Slurm does not answer `scontrol ping`: {last_words(answer.stdout + answer.stderr)}")


class Pace:
    """Says when to ask Slurm again: after 2, 4, 8, ... seconds, and in the end every `longest_s`.

    A controller has thousands of jobs to care for, and the files of a run tell at no cost what can be told.
    """

    def __init__(self, longest_s: float = POLL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._pause_s = self._due = 0.0
        self._asked, self._ended, self._about = False, False, cast(Hashable, None)

    def is_due(self, lives: bool | None, about: Hashable = None) -> bool:
        """Whether to ask now; if so, the caller must.

        `lives` is what the job's own files say, None if they do not tell. A living job needs no question. When it ends,
        or when other jobs are asked `about`, it is time for one at once, and the pauses are short again.
        """
        now, ended, before = self._clock(), lives is False, (self._ended, self._about)
        self._ended, self._about = ended, about
        if not self._asked or about != before[1] or (ended and not before[0]):
            self._pause_s, self._due = min(FIRST_PAUSE_S, self._longest_s), now
        elif lives or now < self._due:
            return False
        self._asked, self._due = True, now + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._longest_s)
        return True


def ask(*command: str, input: str | None = None, timeout_s: float | None = 30) -> "subprocess.CompletedProcess[str]":
    """Runs one of Slurm's commands; bytes that are not text, for example in a site's notice, become question marks."""
    # SQUEUE_PARTITION, SACCT_TIMEFORMAT and so on are meant for people; they would hide or change what is read here.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        return subprocess.run(
            command,
            env=env,
            input=input,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} does not answer within {timeout_s:g} s") from error


def insist(*command: str, when: re.Pattern[str] = AWAY) -> "subprocess.CompletedProcess[str]":
    """Asks as `ask` does, and asks again while the controller does not answer, for `PATIENCE_S`.

    That is for jobs, whose fate depends on it.
    """
    said, deadline = False, time.monotonic() + PATIENCE_S
    # Slurm's tools give up by themselves. Cut off by us, one would leave it open whether it has done what it was told.
    while is_away(done := ask(*command, timeout_s=None), when):
        if time.monotonic() > deadline:
            break
        if not said:
            print(f"{command[0]}: {last_words(done.stdout + done.stderr)}; asking again", file=sys.stderr, flush=True)
        said = True
        time.sleep(AGAIN_S)
    return done


def is_away(done: "subprocess.CompletedProcess[str]", words: re.Pattern[str] = AWAY) -> bool:
    """Whether a command has failed because the controller did not answer."""
    return done.returncode != 0 and words.search(done.stdout + done.stderr) is not None


def last_words(text: str) -> str:
    """Finds why a command of Slurm has failed: the last line that mentions an error, among notices and banners."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no answer"]
    *before, last = [line for line in lines if re.search("error|fail", line, re.IGNORECASE)] or lines
    if last.endswith("Unspecified error") and before:  # the site's own rules have refused it, in words of their own
        return " ".join(line.removeprefix("sbatch: error: ") for line in before)
    return last


def submitted_id(shown: str) -> str | None:
    """Finds the job's id in what sbatch prints, with --parsable or without; None if there is none."""
    found = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*$", shown, re.MULTILINE)
    return found[-1] if found else None


def array_of(job_id: str) -> str:
    """The array that a job is an element of, whose id is then ARRAY_INDEX; the job itself if it is none."""
    return re.sub(r"_\d+$", "", job_id)


def elements_of(job_id: str, count: int) -> list[str]:
    """The ids of an array's elements; one element alone is no array."""
    return [job_id] if count == 1 else [f"{job_id}_{i}" for i in range(count)]


def on_cluster(cluster: str | None, number: str) -> str:
    """Returns the id of a job for this launcher: CLUSTER:NUMBER where the profile names a cluster."""
    return number if cluster is None else f"{cluster}:{number}"


def number_of(job_id: str) -> str:
    """Returns the id of a job for Slurm, without the name of its cluster."""
    return job_id.rpartition(":")[2]


def log_of(job_id: str) -> str:
    """Returns the name of the file that submitit writes a job's output to."""
    return f"{number_of(job_id)}_0_log.out"


def of_cluster(cluster: str | None) -> list[str]:
    """Returns the flag by which Slurm's commands ask this cluster; the usual one needs none."""
    return [] if not cluster else [f"--clusters={cluster}"]


def _by_cluster(job_ids: Iterable[str]) -> dict[str, list[str]]:
    """Sorts the numbers of jobs by the names of their clusters; the usual one has none."""
    found: dict[str, list[str]] = {}
    for job_id in sorted(job_ids):
        found.setdefault(job_id.rpartition(":")[0], []).append(number_of(job_id))
    return found


def config(cluster: str | None = None, ask: "Callable[..., subprocess.CompletedProcess[str]]" = ask) -> dict[str, str]:
    """What `scontrol show config` says, by name; {} if nothing. Raises SlurmError if no answer comes in time.

    A job gives `insist` to ask with.
    """
    shown = ask("scontrol", *of_cluster(cluster), "show", "config").stdout
    return dict(re.findall(r"^(\w+) *= (.*?) *$", shown, re.MULTILINE))


def max_array_size(cluster: str | None = None) -> int:
    """Returns how many elements an array may have (MaxArraySize, usually 1001)."""
    # It is one more than the largest index, and indices begin at 0.
    size = config(cluster=cluster).get("MaxArraySize", "")
    return int(size) if size.isdecimal() else 1001


def active(job_ids: Iterable[str]) -> dict[str, str]:
    """Returns the jobs that wait, run or are ending, with their states, such as {"17": "PENDING"}.

    Raises SlurmError if Slurm does not answer.
    """
    wanted = set(job_ids)
    if not wanted or shutil.which("squeue") is None:
        return {}
    # All of the user's jobs: asked for single ones, squeue fails if it has forgotten one of them.
    # --array: otherwise elements that wait share one line, such as 17_[0-3].
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T"]
    return {
        job_id: state for job_id, state in _rows(command, rf"{_ID}{_STATE}", 30, wanted) if _stands_for(job_id, wanted)
    }


def waits_for(job_id: str, script: str) -> str | None:
    """Returns the job or array of this script that waits for a job to end, "" if there is none, None if nobody tells.

    That is for a job, which asks about itself: after its end its follower waits no more. Raises Unanswered if squeue is
    there and gets no answer.
    """
    if shutil.which("squeue") is None:
        return None
    done = insist("squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%E|%o")
    if is_away(done):
        raise Unanswered(f"squeue: {last_words(done.stdout + done.stderr)}")
    if done.returncode != 0:
        return None
    # An element that waits is called 20_[3], and whoever waits for a whole array depends on 17_*.
    row = rf"^ *(\d+)\S*\|.*\bafterany:{job_id}(?![\d_]).*\|.*/{re.escape(script)} *$"
    found = re.findall(row, done.stdout, re.MULTILINE)
    return found[-1] if found else ""


class JobState(NamedTuple):
    """What Slurm says of a job."""

    state: str
    """The state in Slurm's words: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, ..."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""
    """Where it runs or has run, such as n[1-2]."""
    signal: str = ""
    """The signal that ended it, if one did."""

    @property
    def phase(self) -> Literal["waiting", "running", "ended"]:
        # Any other state, also of a newer Slurm, counts as running, so that no living job is taken for dead.
        return "waiting" if self.state in _WAITING else "ended" if self.state in _ENDED else "running"


_WAITING = {"PENDING", "EXPEDITING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


def look(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Asks Slurm about jobs, by id; the id of an array stands for its tasks, "17" for "17_0", "17_1", ...

    squeue knows the jobs of the last minutes (MinJobAge), sacct all others where there is accounting; jobs that neither
    of them knows are left out. Raises SlurmError if squeue does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    # Without sizes squeue cuts columns at 20 characters; --format would have no exit code.
    columns = "JobArrayID:40|,State:20|,Reason:80|,exit_code:12|,NodeList:400"
    command = ["squeue", "--me", "--states=all", "--array", "--noheader", f"--Format={columns}"]
    found = {}
    for job_id, state, reason, exit_code, nodes in _rows(
        command, rf"{_ID}{_STATE}\|(.*)\|{_CODE}\|(.*)", LOOK_S, wanted
    ):
        why = reason if state in _WAITING and reason != "None" else ""
        found[job_id] = JobState(state, why, nodes, _signal(exit_code))
    found = {job_id: job for job_id, job in found.items() if _stands_for(job_id, wanted)}
    forgotten = wanted - found.keys() - set(map(array_of, found))
    return {**found, **_recall(forgotten)} if forgotten else found


def warn(job_id: str) -> None:
    """Sends the signal that precedes the time limit or a preemption."""
    _control("scancel", "--signal=USR2", job_ids=[job_id])


def requeue(job_id: str) -> None:
    """Stops a job and puts it back into the queue, as an administrator may."""
    _control("scontrol", "requeue", job_ids=[job_id])


def _control(tool: str, *arguments: str, job_ids: Iterable[str]) -> None:
    for cluster, numbers in _by_cluster(job_ids).items():
        done = ask(tool, *of_cluster(cluster), *arguments, *numbers)
        if done.returncode != 0:
            raise SlurmError(f"{tool} refuses: {last_words(done.stderr)}")


def cancel(job_ids: Iterable[str]) -> None:
    """Cancels jobs and whole arrays, waiting and running ones alike. SlurmError with scancel's words if it cannot."""
    _control("scancel", job_ids=job_ids)


def _recall(job_ids: set[str]) -> dict[str, JobState]:
    """Returns what the accounting remembers of ended jobs; {} where there is none or it does not answer."""
    numbers = ",".join(sorted(map(number_of, job_ids)))
    command = ["sacct", "--noheader", "--parsable2", "--format=JobID,State,ExitCode,NodeList", f"--jobs={numbers}"]
    # A step is called JOB.STEP; a cancelled job also says by whom: CANCELLED by 1000.
    row = rf"{_ID}(\.\S+)?{_STATE}(?: by .*)?\|{_CODE}\|(.*)"
    found: dict[str, JobState] = {}
    with suppress(SlurmError):
        for job_id, step, state, exit_code, nodes in _rows(command, row, LOOK_S, job_ids):
            number = _signal(exit_code)
            known = found.get(job_id)
            if known is None:
                found[job_id] = JobState(state, "", nodes.removeprefix("None assigned"), number)
            elif step and (state == "OUT_OF_MEMORY" or number):  # which the job itself may only call FAILED
                worst = state if state == "OUT_OF_MEMORY" else known.state
                found[job_id] = known._replace(state=worst, signal=number or known.signal)
    # A job that squeue has forgotten has ended, so a record that says otherwise is out of date.
    return {job_id: job for job_id, job in found.items() if job.phase == "ended" and _stands_for(job_id, job_ids)}


_ID, _STATE, _CODE = r" *(\d+(?:_\d+)?)", r" *\| *([A-Z_]+) *", r" *(\d+(?::\d+)?) *"


def _rows(command: list[str], pattern: str, timeout_s: float, job_ids: Iterable[str]) -> Iterator[list[str]]:
    """Asks each cluster of the jobs, and yields the groups of the pattern in each line that matches.

    Skips other lines, such as a site's notices. Raises SlurmError if the command fails. The first group is a job's id.
    """
    for cluster in _by_cluster(job_ids):
        try:
            done = ask(command[0], *of_cluster(cluster), *command[1:], timeout_s=timeout_s)
        except FileNotFoundError:
            raise SlurmError(f"there is no {command[0]} on this machine") from None
        if done.returncode != 0:
            raise SlurmError(f"{command[0]} does not answer: {last_words(done.stderr)}")
        for line in done.stdout.splitlines():
            if found := re.fullmatch(pattern, line):
                number, *cells = ((cell or "").strip() for cell in found.groups())
                yield [on_cluster(cluster or None, number), *cells]


def _stands_for(job_id: str, wanted: set[str]) -> bool:
    return job_id in wanted or array_of(job_id) in wanted


def _signal(exit_code: str) -> str:
    """Reads the signal in a job's exit code: its own, or that of a child of its shell (128 + number).

    An exit code is CODE:SIGNAL; in squeue before Slurm 23 it is one number, as wait(2) gives it.
    """
    first, colon, second = exit_code.partition(":")
    code, number = (int(first), int(second)) if colon else (int(first) >> 8, int(first) & 127)
    try:
        return signal.Signals(number or code - 128).name
    except ValueError:
        return ""
