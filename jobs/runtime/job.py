"""What all jobs have in common: each is a picklable value that the launcher hands to a place. Importable without torch.

All have what `slurm.place.Job` asks for: a call that does the work, `failed` and `submitted`.
"""

import errno
import os
import platform
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from diffusion.errors import OutsideError, UserError, reason
from jobs.runtime.malloc import importing, keep_freed_memory
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.runtime.surroundings import undisturbed


class Requeue(Protocol):
    """What a job is given where it can be queued again."""

    def __call__(self) -> str | None:
        """Queues the job again unless it has been cancelled; returns its new id, None if it does not come back."""

    def had_its_time(self) -> bool:
        """Whether the job stops because its time limit is near, rather than to make room for another one."""


class JobError(OutsideError):
    """A job's failure that one sentence explains; no traceback is printed. Another try would fail in the same way."""


class MachineError(JobError):
    """The machine fails, not the job: another try, perhaps on another node, may succeed."""


class Target(Protocol):
    """What an independent job completes."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    def job_ids(self) -> list[str]:
        """The Slurm jobs that have worked on it."""

    def add_job(self, job_id: str) -> None:
        """Remembers a Slurm job that works on it."""


class IndependentJob(ABC):
    """A job whose processes do not need each other: each does a share, and another may do what one has left undone."""

    target: Target
    """What the job completes; it keeps the ids of the jobs that work on it."""
    advice: ClassVar[str] = "The same command goes on from here."
    """What a person who stops it is told."""

    @abstractmethod
    def work(self, signals: SignalWatch) -> int:
        """Does this process's share and returns the exit code; may raise Stopped when a signal has come."""

    def around(self) -> AbstractContextManager[Any]:
        """Returns a context for the work; it is left after a stopped job has been queued again, not before."""
        return nullcontext()

    def __call__(self, requeue: Requeue | None = None) -> int:
        keep_freed_memory()
        with undisturbed(), SignalWatch() as signals:
            try:
                # Inside the try, because a torch that cannot be imported is a failure to be recorded like any other.
                with importing():
                    import torch  # noqa: F401  which all these jobs need
                with self.around():
                    try:
                        return self.work(signals)
                    except Stopped:
                        return self._stopped(signals.requested, requeue)
            except (UserError, JobError) as error:
                self.failed(process_rank(), str(error))
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        job_id = submit()
        self.target.add_job(job_id)
        return job_id

    def comes_back_as(self, job_id: str) -> None:
        """Records under which id the job is queued again, unless it is known, or an element of a known array."""
        known = self.target.job_ids()
        if not any(job_id == other or job_id.startswith(f"{other}_") for other in known):
            self.target.add_job(job_id)

    def _stopped(self, reason: Stop, requeue: Requeue | None) -> int:
        """Ends the job after a signal, and queues it again where that is meant; returns the exit code."""
        if requeue is not None and reason is not Stop.INTERRUPT and (job_id := requeue()) is not None:
            self.comes_back_as(job_id)
            print(f"Stopped; queued again as job {job_id}.", flush=True)
            return 0
        if process_rank() == 0:
            print(f"Stopped. {self.advice}", file=sys.stderr, flush=True)
        return 130


def submitted(jobs: Sequence[IndependentJob], submit: Callable[[], str]) -> str:
    """Submits an array of jobs with one target. A function with a name, since the job after the array pickles it."""
    return jobs[0].submitted(submit)


OUTSIDE = re.compile(
    r"gloo|nccl|connection|socket|timed out|timeout|\bECC\b|CUDA error: (?!device-side assert|out of memory)"
    r"|(?:CUBLAS|CUDNN)_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR)",
    re.IGNORECASE,
)
"""Libraries say so in a RuntimeError where a network, another process or a GPU has failed.

A fault in the code may end in such an error of CUDA, too; then it ends the run once its budget is used up.
"""


def is_outside(error: Exception) -> bool:
    """Whether an exception tells of the machine, or of another process, rather than of a fault in the code.

    torch is not imported for that: its errors of communication are known by their name.
    """
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    said = isinstance(error, RuntimeError) and OUTSIDE.search(str(error)) is not None
    return isinstance(error, OSError | MachineError) or of_torch or said


class Failure(NamedTuple):
    """Why a process has failed, and whether another try may help."""

    trace: str
    outside: bool
    """Whether it is the machine's fault."""
    for_good: bool
    """Whether another try would fail in the same way: a person must change something."""


def failure_of(error: Exception, doing: str) -> Failure:
    """Describes an exception; `doing` is what was being done, by which it is recognised if it comes twice."""
    if isinstance(error, UserError | JobError):
        # One with a cause is of a disk that cannot be read at this moment.
        outside = isinstance(error, MachineError) or isinstance(error.__cause__, OSError)
        return Failure(str(error), outside, not outside)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
        return Failure(reason(error), True, False)
    return Failure(f"In {doing}:\n{''.join(traceback.format_exception(error))}", is_outside(error), False)


def process_node() -> str:
    """Returns the name of the machine that this process runs on, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def process_rank() -> int:
    """Returns the number of this process in its job."""
    return int(os.environ.get("RANK", "0"))
