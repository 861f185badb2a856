"""Places where a job can run: this machine, or Slurm with the settings of a site."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slurm import local, queue
from slurm.profile import Profile
from slurm.submit import Submission
from slurm.task import Requeue


class Job(Protocol):
    """What a place needs of a job: a picklable callable, the same in each of its processes."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        """Does the work and returns an exit code; `requeue` is given where the job can be queued again."""

    def failed(self, rank: int, trace: str) -> None:
        """Tells and records why process `rank` failed, unless another one has failed before it."""

    def submitted(self, submit: Callable[[], str]) -> str:
        """Submits with `submit`, which returns the id of the Slurm job, and records it; returns the id."""


@dataclass(frozen=True)
class Here:
    """This machine: one process in this one, so that debuggers work, several below it."""

    processes: int

    def check(self, job: Job) -> None:
        """This machine takes any job."""

    def describe(self, job: Job) -> str:
        """What `run` would do."""
        return f"Would run on this machine in {self.processes} process{'es' if self.processes > 1 else ''}."

    def run(self, job: Job, keep_open: int | None = None) -> int:
        """Runs the job to its end and returns its exit code; child processes inherit the descriptor `keep_open`."""
        if self.processes == 1:
            return job()
        outcome = local.run(job, self.processes, keep_open=[] if keep_open is None else [keep_open])
        if outcome.signal is not None:
            job.failed(outcome.failed_rank, f"process {outcome.failed_rank} was ended by {outcome.signal}")
        return outcome.exit_code


@dataclass(frozen=True)
class OnSlurm:
    """A Slurm cluster: `processes` tasks, one for each GPU."""

    processes: int
    profile: Profile
    on_gpus: bool
    name: str
    """Of the job."""
    folder: Path
    """For scripts, logs and pickles."""
    code: Path
    """The copy of the code that the job runs."""

    def check(self, job: Job) -> None:
        """Raises ValueError with Slurm's own words if it would refuse the job."""
        self._submission(job).check()

    def describe(self, job: Job) -> str:
        """The script that `run` would submit."""
        return self._submission(job).script()

    def run(self, job: Job, wait: bool) -> str:
        """Submits the job and returns its id; with `wait`, when it has ended. RuntimeError if Slurm refuses."""
        submission = self._submission(job)
        job_id = job.submitted(submission.submit)
        shape = submission.shape
        print(f"Submitted {self.name} as job {job_id}: {shape.tasks} tasks on {shape.nodes} nodes.")
        print(f"It prints into {self.folder}/{job_id}_0_log.out", flush=True)
        while wait and queue.active([job_id]):
            time.sleep(1)
        return job_id

    def _submission(self, job: Job) -> Submission:
        return Submission(self.name, job, self.profile, self.processes, self.on_gpus, self.folder, self.code)
