"""Places where a job can run: this machine, or Slurm with the settings of a site."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        self._wait(wait, [job_id])
        return job_id

    def describe_array(self, jobs: Sequence[Job], then: Job) -> str:
        """The scripts that `run_array` would submit."""
        arrays = [self._array(chunk).script() for chunk in self._chunks(jobs)]
        return "\n".join([*arrays, self._last(then, ["ARRAY"] * len(arrays)).script()])

    def run_array(self, jobs: Sequence[Job], then: Job, wait: bool) -> list[str]:
        """Submits the jobs as an array, of which `processes` run at once, one task each, and `then` to follow.

        Several arrays where Slurm's MaxArraySize asks for it. Returns the ids of all that was submitted.
        """
        job_ids = [chunk[0].submitted(self._array(chunk).submit) for chunk in self._chunks(jobs)]
        if jobs:
            ids = ", ".join(job_ids)
            print(f"Submitted {self.name} as {len(jobs)} jobs of one task, {self.processes} at once: {ids}.")
        job_ids.append(then.submitted(self._last(then, job_ids).submit))
        print(f"Job {job_ids[-1]} puts the results together after them.", flush=True)
        self._wait(wait, job_ids)
        return job_ids

    def _chunks(self, jobs: Sequence[Job]) -> list[Sequence[Job]]:
        limit = queue.max_array_size()
        return [jobs[i : i + limit] for i in range(0, len(jobs), limit)]

    def _array(self, jobs: Sequence[Job]) -> Submission:
        return replace(self._submission(*jobs), gpus=1, at_once=self.processes)

    def _last(self, job: Job, job_ids: Sequence[str]) -> Submission:
        after = ":".join(job_ids) if job_ids else None
        return replace(self._submission(job), gpus=1, on_gpus=False, after=after)

    def _wait(self, wait: bool, job_ids: Sequence[str]) -> None:
        while wait and queue.active(job_ids):
            time.sleep(1)

    def _submission(self, *jobs: Job) -> Submission:
        return Submission(self.name, jobs, self.profile, self.processes, self.on_gpus, self.folder, self.code)
