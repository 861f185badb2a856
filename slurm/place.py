"""Places where a job can run: this machine, or Slurm with the settings of a site."""

import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from slurm import allocation, local, queue
from slurm.environment import forget_other_launchers
from slurm.errors import SlurmError
from slurm.profile import Profile
from slurm.submit import Submission
from slurm.task import Requeue, Retried, Work


class Job(Protocol):
    """What a place needs of a job: a picklable callable, which is the same in each of its processes."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        """Does the work and returns an exit code; `requeue` is given where the job can be queued again."""

    def failed(self, rank: int, trace: str) -> None:
        """Prints and records why process `rank` failed, unless another one has failed before it."""

    def submitted(self, submit: Callable[[], str]) -> str:
        """Submits with `submit`, which returns the id of the Slurm job, and records it; returns the id."""


class Merge(Job, Protocol):
    """What follows an array of jobs; it fails if they have left something undone."""

    def lost(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Returns jobs that do what these have left undone."""

    def comes_back_as(self, job_id: str) -> None:
        """Records under which id the job is queued again."""


J = TypeVar("J", bound=Job)
ROUNDS = 2
"""How many times an array submits again the elements that were killed, or lost with their nodes."""
Submitted = Callable[[Sequence[J], Callable[[], str]], str]


@dataclass(frozen=True)
class Here:
    """This machine, or the allocation that it is in. A single process is this one, so that debuggers work."""

    processes: int
    step: allocation.Step | None = None
    """Set if the processes need several nodes of the allocation that this one is in."""
    folder: Path = Path()
    """One that all these nodes see; the processes meet through a file in it."""

    def check(self, job: Job) -> str:
        """Accepts any job."""
        return ""

    def describe(self, job: Job) -> str:
        """Says what `run` would do."""
        if self.step is not None:
            shape = self.step.shape
            return f"Would run in this allocation, {shape.tasks_per_node} processes on each of {shape.nodes} nodes."
        return f"Would run on this machine in {self.processes} process{'es' if self.processes > 1 else ''}."

    def run(self, job: Job, keep_open: Sequence[int] = ()) -> int:
        """Runs the job to its end and returns its exit code; child processes inherit the descriptors `keep_open`.

        A job that may be tried again is a child even if it is one process, because its parent must survive to decide.
        """
        retried = job if isinstance(job, Retried) else None
        if self.step is not None:
            # A name that no other start has: one that was killed while its processes met has left its file behind.
            code = allocation.run(job, self.step, self.folder / f".port-{uuid.uuid4().hex}", keep_open=keep_open)
            if code in (0, 130):
                return code
            ended = f"srun ended with exit code {code}: a process has failed without a word, or none started"
            if retried is not None and retried.is_done(ended):
                return 0
            job.failed(0, ended)
            return 1
        if self.processes == 1:
            forget_other_launchers()
        if self.processes == 1 and (retried is None or retried.retries == 0):
            return job()
        while True:
            outcome = local.run(job, self.processes, keep_open=keep_open)
            if outcome.exit_code in (0, 130):
                return outcome.exit_code
            cause = None
            if outcome.signal is not None:
                cause = f"process {outcome.failed_rank} was ended by {outcome.signal}"
            if retried is None:
                if cause is not None:
                    job.failed(outcome.failed_rank, cause)
                return outcome.exit_code
            if retried.is_done(cause):
                return 0
            if outcome.was_told_to_stop:
                told: Any = job
                retried = replace(told, retries=0)  # then it is only written down that it has failed
            if not retried.try_again_after(cause, platform.node(), None):
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

    def start_of(self, processes: int) -> str:
        """Returns when Slurm would start a job of so many tasks, "" if it does not say; UserError if it never would."""
        return replace(self, processes=processes)._submission().check()

    def describe(self, job: Job) -> str:
        """Returns the script that `run` would submit."""
        return self._submission(job).script()

    def run(self, job: Job) -> str:
        """Submits the job and returns its id; SlurmError if Slurm refuses."""
        submission = self._submission(job)
        job_id = job.submitted(submission.submit)
        shape = submission.shape
        print(f"Submitted {self.name} as job {job_id}: {shape.tasks} tasks on {shape.nodes} nodes.")
        print(f"Log: {self.folder}/{queue.log_of(job_id)}", flush=True)
        return job_id

    def check_array(self, jobs: Sequence[Job], then: Job | None = None) -> None:
        """Raises UserError with Slurm's own words if it would refuse the array, or the job that follows it."""
        # The other arrays ask for the same, and none of them is longer than the first.
        for chunk in self._chunks(jobs)[:1]:
            self._array(chunk, None).check()
        if then is not None:
            self._last(then, []).check()

    def elements(self, wanted: int, others: int = 1) -> int:
        """Returns how many elements an array may have beside so many other jobs, where the site limits jobs.

        One of these is the job that follows the array.
        """
        return wanted if self.profile.max_jobs is None else min(wanted, self.profile.max_jobs - others)

    def describe_array(self, jobs: Sequence[Job], at_once: int | None = None, then: Merge | None = None) -> str:
        """Returns the scripts that `run_array` would submit."""
        arrays = [self._array(chunk, at_once).script() for chunk in self._chunks(jobs)]
        last = [] if then is None else [self._last(then, ["ARRAY"] * len(arrays)).script()]
        return "\n".join([*arrays, *last])

    def run_array(
        self,
        jobs: Sequence[J],
        submitted: Submitted[J],
        at_once: int | None = None,
        then: Merge | None = None,
        rounds: int = ROUNDS,
        later: Sequence[J] = (),
    ) -> list[str]:
        """Submits the jobs as an array, at most `at_once` of them running at a time, and `then` to follow.

        What the jobs leave undone is submitted again before `then` gives up, `rounds` times at most without progress
        between; so are those that come `later`, because the site allows no more now.

        There are several arrays if Slurm's MaxArraySize makes it necessary. `submitted(jobs, submit)` must call
        `submit`, which returns the array's id, and record and return it. Returns the ids of all arrays and of `then`.
        """
        chunks = self._chunks(jobs)
        job_ids = [submitted(chunk, self._array(chunk, at_once).submit) for chunk in chunks]
        if jobs:
            print(f"Submitted {self.name} as an array of {len(jobs)} jobs: {', '.join(job_ids)}.", flush=True)
        if then is not None:
            sizes = zip(job_ids, map(len, chunks), strict=True)
            own = [element for job_id, size in sizes for element in queue.elements_of(job_id, size)]
            last = AfterArray(self, [*jobs, *later], own, submitted, at_once, then, rounds)
            job_ids.append(then.submitted(self._last(last, job_ids).submit))
            print(f"Job {job_ids[-1]} then merges the results.", flush=True)
        return job_ids

    def wait(self, job_ids: Callable[[], Sequence[str]], lives: Callable[[], bool | None]) -> None:
        """Returns when none of the jobs waits or runs any more.

        `lives` is asked every second what the jobs' own files say (see `queue.Pace`), so that Slurm seldom has to be.
        """
        pace = queue.Pace(self.profile.poll_s)
        while True:
            if pace.is_due(lives()):
                try:
                    if not queue.active(job_ids()):
                        return
                except SlurmError as error:  # the jobs go on without it
                    print(f"warning: {error}; it is asked again", file=sys.stderr, flush=True)
            time.sleep(1)

    def _chunks(self, jobs: Sequence[J]) -> list[Sequence[J]]:
        limit = queue.max_array_size(self.profile.cluster)
        return [jobs[i : i + limit] for i in range(0, len(jobs), limit)]

    def _array(self, jobs: Sequence[Job], at_once: int | None) -> Submission:
        # submitit writes a limit into every array; one of the array's own length is none.
        return replace(self._submission(*jobs), at_once=at_once or len(jobs))

    def _last(self, job: Work, job_ids: Sequence[str]) -> Submission:
        after = ":".join(map(queue.number_of, job_ids)) if job_ids else None
        return replace(self._submission(job), gpus=1, on_gpus=False, after=after)

    def _submission(self, *jobs: Work) -> Submission:
        return Submission(self.name, jobs, self.profile, self.processes, self.on_gpus, self.folder, self.code)


@dataclass(frozen=True)
class AfterArray:
    """Runs in the job after an array: merges, or first has done again what elements of the array have left undone."""

    place: OnSlurm
    jobs: Sequence[Any]
    job_ids: Sequence[str]
    """The ids of the jobs in the array."""
    submitted: Submitted[Any]
    at_once: int | None
    then: Merge
    rounds: int

    def __call__(self, requeue: Requeue) -> int:
        code = self.then(requeue)
        if code in (0, 130) or not (lost := self.then.lost(self.jobs)):
            return code
        if self.rounds > 0 and not self._was_cancelled():
            if self._submit(lost):
                # What was submitted has a merge of its own, which takes over from this one.
                return 0
            if not self.place.on_gpus:  # this job has none itself
                for job in lost:
                    if (code := job(requeue)) != 0 or requeue.came_back:
                        return code
                return self.then(requeue)
        print("Something is still missing: the command that submitted this does the rest.", flush=True)
        return code

    def failed(self, rank: int, trace: str) -> None:
        self.then.failed(rank, trace)

    def comes_back_as(self, job_id: str) -> None:
        self.then.comes_back_as(job_id)

    def _submit(self, lost: Sequence[Any]) -> bool:
        """Submits lost jobs again, and their merge; returns whether that is possible from this node."""
        if shutil.which("sbatch") is None:
            return False
        if not (now := self.place.elements(len(lost), others=2)):  # this job, and the one that follows the array
            return False
        # A round counts only if it got nothing done: then as many are lost as there were.
        rounds = self.rounds - (len(lost) == len(self.jobs))
        try:
            self.place.run_array(lost[:now], self.submitted, self.at_once, self.then, rounds, lost[now:])
        except SlurmError as error:
            print(error, flush=True)
            return False
        return True

    def _was_cancelled(self) -> bool:
        """Whether somebody has cancelled elements of the array: then they stay away."""
        try:
            known = queue.look(self.job_ids)
        except SlurmError:
            # Then only the logs tell which elements have begun.
            known = {}
        # Slurm itself forgets an element at once that is cancelled while it waits; but then it has no log.
        begun = {path.name for path in self.place.folder.glob("*_log.out")}
        unknown = [job_id for job_id in self.job_ids if job_id not in known and queue.log_of(job_id) not in begun]
        return bool(unknown) or any(job.state == "CANCELLED" for job in known.values())
