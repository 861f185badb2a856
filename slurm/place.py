"""Places where a job can run: this machine, or Slurm with the settings of a site."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from slurm import local, queue
from slurm.profile import Profile
from slurm.submit import Submission
from slurm.task import Requeue


class Job(Protocol):
    """What a place needs of a job: a picklable callable, which is the same in each of its processes."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        """Does the work and returns an exit code; `requeue` is given where the job can be queued again."""

    def failed(self, rank: int, trace: str) -> None:
        """Prints and records why process `rank` failed, unless another one has failed before it."""

    def submitted(self, submit: Callable[[], str]) -> str:
        """Submits with `submit`, which returns the id of the Slurm job, and records it; returns the id."""


J = TypeVar("J", bound=Job)
Submitted = Callable[[Sequence[J], Callable[[], str]], str]


@dataclass(frozen=True)
class Here:
    """This machine. A single process is this one, so that debuggers work; several are its children."""

    processes: int

    def check(self, job: Job) -> str:
        """Accepts any job."""
        return ""

    def describe(self, job: Job) -> str:
        """Says what `run` would do."""
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
    """A Slurm cluster; a job has `processes` tasks, one for each GPU."""

    processes: int
    profile: Profile
    on_gpus: bool
    name: str
    """The job's name in Slurm."""
    folder: Path
    """The folder for scripts, logs and pickles."""
    code: Path
    """The copy of the code that the job runs."""

    def check(self, job: Job) -> str:
        """Returns when Slurm would start the job, if it says so; UserError with its words if it would refuse it."""
        return self._submission(job).check()

    def describe(self, job: Job) -> str:
        """Returns the script that `run` would submit."""
        return self._submission(job).script()

    def run(self, job: Job) -> str:
        """Submits the job and returns its id; SlurmError if Slurm refuses."""
        submission = self._submission(job)
        job_id = job.submitted(submission.submit)
        shape = submission.shape
        print(f"Submitted {self.name} as job {job_id}: {shape.tasks} tasks on {shape.nodes} nodes.")
        print(f"Log: {self.folder}/{queue.number_of(job_id)}_0_log.out", flush=True)
        return job_id

    def check_array(self, jobs: Sequence[Job], then: Job | None = None) -> None:
        """Raises UserError with Slurm's own words if it would refuse the array, or the job that follows it."""
        for chunk in self._chunks(jobs)[:1]:
            self._array(chunk, None).check()
        if then is not None:
            self._last(then, []).check()

    def elements(self, wanted: int) -> int:
        """Returns how many elements an array may have that another job follows, where the site limits jobs."""
        return wanted if self.profile.max_jobs is None else min(wanted, self.profile.max_jobs - 1)

    def describe_array(self, jobs: Sequence[Job], at_once: int | None = None, then: Job | None = None) -> str:
        """Returns the scripts that `run_array` would submit."""
        arrays = [self._array(chunk, at_once).script() for chunk in self._chunks(jobs)]
        last = [] if then is None else [self._last(then, ["ARRAY"] * len(arrays)).script()]
        return "\n".join([*arrays, *last])

    def run_array(
        self, jobs: Sequence[J], submitted: Submitted[J], at_once: int | None = None, then: Job | None = None
    ) -> list[str]:
        """Submits the jobs as an array, at most `at_once` of them running at a time, and `then` to follow.

        There are several arrays if Slurm's MaxArraySize makes it necessary. `submitted(jobs, submit)` must call
        `submit`, which returns the array's id, and record and return it. Returns the ids of all arrays and of `then`.
        """
        job_ids = [submitted(chunk, self._array(chunk, at_once).submit) for chunk in self._chunks(jobs)]
        if jobs:
            print(f"Submitted {self.name} as an array of {len(jobs)} jobs: {', '.join(job_ids)}.", flush=True)
        if then is not None:
            job_ids.append(then.submitted(self._last(then, job_ids).submit))
            print(f"Job {job_ids[-1]} then merges the results.", flush=True)
        return job_ids

    def wait(self, job_ids: Sequence[str]) -> None:
        """Returns when none of the jobs waits or runs any more."""
        while queue.active(job_ids):
            time.sleep(1)

    def _chunks(self, jobs: Sequence[J]) -> list[Sequence[J]]:
        limit = queue.max_array_size(self.profile.cluster)
        return [jobs[i : i + limit] for i in range(0, len(jobs), limit)]

    def _array(self, jobs: Sequence[Job], at_once: int | None) -> Submission:
        return replace(self._submission(*jobs), at_once=at_once or len(jobs))

    def _last(self, job: Job, job_ids: Sequence[str]) -> Submission:
        after = ":".join(map(queue.number_of, job_ids)) if job_ids else None
        return replace(self._submission(job), gpus=1, on_gpus=False, after=after)

    def _submission(self, *jobs: Job) -> Submission:
        return Submission(self.name, jobs, self.profile, self.processes, self.on_gpus, self.folder, self.code)
