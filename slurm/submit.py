"""Submits jobs to Slurm through submitit."""

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import queue
from slurm.environment import outside_any_job
from slurm.errors import SlurmError, UserError
from slurm.profile import Profile
from slurm.task import SlurmTask, Work

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor

_PYTHON = f"{shlex.quote(sys.executable)} -S -m slurm.shield {shlex.quote(sys.executable)}"


_OURS = ("job-name", "output", "error", "open-mode", "chdir", "requeue", "signal", "dependency", "array")
"""Flags of sbatch that every job of ours has, wherever it runs."""


@dataclass(frozen=True)
class Shape:
    """How many nodes a job has, and how many tasks on each; one task for each GPU."""

    nodes: int
    tasks_per_node: int

    @staticmethod
    def of(gpus: int, gpus_per_node: int) -> "Shape":
        """Raises UserError where several nodes would not be filled."""
        if gpus <= gpus_per_node:
            return Shape(1, gpus)
        if gpus % gpus_per_node:
            raise UserError(
                f"--gpus must be a multiple of gpus_per_node={gpus_per_node} where it takes several nodes; got {gpus}"
            )
        return Shape(gpus // gpus_per_node, gpus_per_node)

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Submission:
    """A job, ready to be submitted: what runs, with which resources, from which folders."""

    name: str
    works: Sequence[Work]
    """What runs: one work is a job, several are an array of jobs."""
    profile: Profile
    gpus: int
    on_gpus: bool
    """False for a rehearsal of a GPU job with CPU processes."""
    folder: Path
    """submitit's folder: script, pickles, logs."""
    code: Path
    """The copy of the code that the job runs."""
    at_once: int = 1
    """How many elements of an array may run at the same time."""
    after: str | None = None
    """A job or array that must end first, well or badly."""

    @property
    def shape(self) -> Shape:
        return Shape.of(self.gpus, self.profile.gpus_per_node)

    def script(self) -> str:
        """Returns the sbatch script that `submit` submits; writes nothing."""
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{_PYTHON} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        elements = len(self.works) if len(self.works) > 1 else None
        script: str = _make_sbatch_string(command, self.folder, map_count=elements, **self._parameters())
        return script

    def check(self) -> None:
        """Raises UserError with Slurm's own words if it would refuse the job; nothing is submitted or written."""
        if shutil.which("srun") is None:
            raise UserError("a job on Slurm needs srun beside sbatch; there is none on this machine")
        with outside_any_job():
            asked = queue.ask("sbatch", "--test-only", input=self.script())
        if asked.returncode != 0:
            raise UserError(self._refusal(asked.stderr))

    def submit(self) -> str:
        """Submits and returns the id of the job or the array; SlurmError with Slurm's own words if it refuses."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        self.folder.mkdir(parents=True, exist_ok=True)  # before Slurm 23.02 logs are lost if it is not there
        executor = _executor(self.folder)
        executor.update_parameters(**self._parameters())
        try:
            with outside_any_job():
                working_s = 60 * self.profile.time_min - self.profile.signal_delay_s
                tasks = [SlurmTask(work, working_s) for work in self.works]
                if len(tasks) == 1:
                    return str(executor.submit(tasks[0]).job_id)
                with executor.batch():
                    elements = [executor.submit(task) for task in tasks]
            return queue.array_of(elements[0].job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            raise SlurmError(self._refusal(str(error))) from None

    def _refusal(self, said: str) -> str:
        """Puts what the site can have disliked beside Slurm's words, which seldom name it."""
        flags = re.findall(r"^#SBATCH (--([\w-]+).*)$", self.script(), re.MULTILINE)
        asked = " ".join(flag for flag, name in flags if name not in _OURS)
        return f"Slurm refuses the job: {queue.last_words(said)}. It was asked for: {asked}"

    def _parameters(self) -> dict[str, Any]:
        profile, shape = self.profile, self.shape
        exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
        return {
            "job_name": self.name,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "time": profile.time_min,
            "nodes": shape.nodes,
            "ntasks_per_node": shape.tasks_per_node,
            "gpus_per_node": shape.tasks_per_node if self.on_gpus else None,
            "cpus_per_task": profile.cpus_per_gpu,
            "mem": f"{profile.mem_gb}GB" if profile.mem_gb is not None else None,
            "dependency": f"afterany:{self.after}" if self.after is not None else None,
            "array_parallelism": self.at_once,
            "signal_delay_s": profile.signal_delay_s,
            "stderr_to_stdout": True,
            "setup": [*profile.setup, *exports],
            # --cpus-per-task: Slurm 22.05 and later do not hand it on to srun. --kill-on-bad-exit: one failed task must
            # end the others. --wait=0: after the first has ended well, the others may take long, whatever the site's
            # WaitTime. --distribution: neighbours in rank share a node, and a socket.
            "srun_args": [
                *(f"--cpus-per-task={profile.cpus_per_gpu}", "--kill-on-bad-exit=1"),
                *("--wait=0", "--distribution=block:block"),
            ],
            # requeue: a site with JobRequeue=0 would refuse it. chdir: there `python -m` looks for modules first.
            "additional_parameters": {"requeue": True, "chdir": str(self.code)},
        }


def _executor(folder: Path) -> "SlurmExecutor":
    from submitit.core.utils import FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """Finds the job's id among other words; submitit would take the first "job NUMBER", even in a site's notice.

        It would also read sbatch's words as UTF-8, and where they are none, lose a job that is queued already.
        """

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            done = queue.ask("sbatch", str(submission_file_path), timeout_s=None)
            if done.returncode != 0:
                raise FailedSubmissionError(done.stderr)
            return ["echo", done.stdout]  # submitit runs a command and reads what it prints

        @staticmethod
        def _get_job_id_from_submission_command(string: str | bytes) -> str:
            text = string if isinstance(string, str) else string.decode(errors="replace")
            if (job_id := queue.submitted_id(text)) is None:
                raise FailedSubmissionError(f"sbatch names no job: {queue.last_words(text)}")
            return job_id

    return Executor(folder, python=_PYTHON)
