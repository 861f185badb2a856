"""Submits jobs to Slurm through submitit."""

import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm import queue
from slurm.environment import outside_any_job
from slurm.errors import SlurmError, UserError
from slurm.profile import PLAIN, Profile
from slurm.task import WISH, SlurmTask, Work

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
    def asked(self) -> Profile:
        """What to ask for: a job that needs no GPU may have a partition of its own."""
        return self.profile if self.on_gpus else self.profile.without_gpus()

    @property
    def shape(self) -> Shape:
        return Shape.of(self.gpus, self.asked.gpus_per_node)

    def script(self) -> str:
        """Returns the sbatch script that `submit` submits; writes nothing."""
        # A private function, because no public one of submitit makes a script without submitting it.
        from submitit.slurm.slurm import _make_sbatch_string

        # A profile's command may have several words, such as a container's, so it is not quoted.
        python = self.asked.python or shlex.quote(sys.executable)
        # -S leaves site-packages alone, which the shield does not need: until it runs, a signal kills the task.
        command = f"{python} -S -m slurm.shield -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        elements = len(self.works) if len(self.works) > 1 else None
        script: str = _make_sbatch_string(command, self.folder, map_count=elements, **self._parameters())
        return script

    def check(self) -> str:
        """Returns when the job would start, as Slurm says ("" if it does not); nothing is submitted or written.

        Raises UserError with Slurm's own words if it would refuse the job.
        """
        if shutil.which("srun") is None:
            raise UserError("a job on Slurm needs srun beside sbatch; there is none on this machine")
        with outside_any_job():
            asked = queue.ask("sbatch", "--test-only", input=self.script())
        if asked.returncode != 0:
            raise UserError(self._refusal(asked.stderr))
        start = re.search(r" to start at (\d{4}-\S+)", asked.stderr + asked.stdout)
        return start[1] if start else ""

    def submit(self) -> str:
        """Submits and returns the id of the job or the array; SlurmError with Slurm's own words if it refuses."""
        from submitit.core.utils import DelayedSubmission

        self.folder.mkdir(parents=True, exist_ok=True)  # before Slurm 23.02 logs are lost if it is not there
        asked, mark = self.asked, uuid.uuid4().hex
        working_s = 60 * asked.time_min - asked.signal_delay_s
        # All is written before there is a job: a full disk fails in time, and once the job may run, only names change.
        script, pickles = self.folder / f".{mark}.sh", []
        try:
            script.write_text(self.script())
            for i, work in enumerate(self.works):
                task = SlurmTask(work, working_s, asked.cluster, asked.host_suffix, asked.interface)
                pickles.append(self.folder / f".{mark}-{i}.pkl")
                DelayedSubmission(task).dump(pickles[-1])
        except OSError as error:
            for path in (script, *pickles):
                path.unlink(missing_ok=True)
            raise UserError(f"no job can be submitted from {self.folder}: {error.strerror}") from error
        with outside_any_job():
            # Without a time limit: sbatch may have queued the job before it is cut off, and its id would be lost.
            done = queue.ask("sbatch", "--parsable", str(script), timeout_s=None)
        number = queue.submitted_id(done.stdout) if done.returncode == 0 else None
        if number is None:
            for path in (script, *pickles):
                path.unlink()
            raise SlurmError(self._refusal(done.stdout + done.stderr))
        # The names under which each task looks for its pickle, for up to a minute.
        script.rename(self.folder / f"{number}_submission.sh")
        for i, path in enumerate(pickles):
            path.rename(self.folder / f"{number if len(pickles) == 1 else f'{number}_{i}'}_submitted.pkl")
        return queue.on_cluster(asked.cluster, number)

    def _refusal(self, said: str) -> str:
        """Puts what the site can have disliked beside Slurm's words, which seldom name it."""
        flags = re.findall(r"^#SBATCH (--([\w-]+).*)$", self.script(), re.MULTILINE)
        asked = " ".join(flag for flag, name in flags if name not in _OURS)
        return f"Slurm refuses the job: {queue.last_words(said)}. It was asked for: {asked}"

    def _parameters(self) -> dict[str, Any]:
        """Returns what submitit makes a script of."""
        asked, shape = self.asked, self.shape
        setup = [*asked.setup, *(f"export {name}={shlex.quote(value)}" for name, value in asked.environment.items())]
        flags: dict[str, Any] = {
            "job-name": self.name,
            **{flag: getattr(asked, key) for flag, key in PLAIN.items()},
            "time": asked.time_min,
            "nodes": shape.nodes,
            "ntasks": shape.tasks if asked.ntasks else None,
            "ntasks-per-node": shape.tasks_per_node,
            "cpus-per-task": asked.cpus_per_gpu,
            "dependency": f"afterany:{self.after}" if self.after is not None else None,
            "requeue": True,  # a site with JobRequeue=0 would refuse it
            "chdir": str(self.code),  # there `python -m` looks for modules first
            **self._memory(),
        }
        further = {
            flag: value.replace("{gpus}", str(shape.tasks_per_node)) if isinstance(value, str) else value
            for flag, value in asked.sbatch.items()
            # A flag with {gpus} asks for GPUs, which this job does not need.
            if self.on_gpus or "{gpus}" not in str(value)
        }
        flags |= further
        if self.on_gpus:
            # Last, because in the form `gres` it holds the table's gres as well, and must replace it.
            flags |= self._gpus()
        # --cpus-per-task: Slurm 22.05 and later do not hand it on to srun. --kill-on-bad-exit: one failed task must
        # end the others. --wait=0: after the first has ended well, the others may take long, whatever the site's
        # WaitTime. --distribution: neighbours in rank share a node, and a socket.
        cpus = [f"--cpus-per-task={asked.cpus_per_gpu}"] if flags["cpus-per-task"] else []
        return {
            "array_parallelism": self.at_once,
            "signal_delay_s": asked.signal_delay_s,
            "stderr_to_stdout": True,
            "setup": [_LOG_START, *setup, "set +e"],
            "teardown": [_after(self.folder)],
            "srun_args": [
                *(*cpus, "--kill-on-bad-exit=1"),
                *("--wait=0", "--distribution=block:block", *asked.srun_args),
            ],
            # submitit's own values for these, which it calls by other names, would be given twice.
            **dict.fromkeys(("job_name", "nodes", "time", "wckey")),
            "additional_parameters": {k: v for k, v in flags.items() if v is not None and v is not False},
        }

    def _gpus(self) -> dict[str, str]:
        """Returns the flag that asks for GPUs in the site's form."""
        kind = f"{self.asked.gpu_type}:" if self.asked.gpu_type is not None else ""
        match self.asked.gpu_request:
            case "gpus-per-node":
                return {"gpus-per-node": f"{kind}{self.shape.tasks_per_node}"}
            case "gpus-per-task":
                return {"gpus-per-task": f"{kind}1"}
            case "gres":
                others = self.asked.sbatch.get("gres")
                return {"gres": f"gpu:{kind}{self.shape.tasks_per_node}" + (f",{others}" if others else "")}
            case "none":
                return {}

    def _memory(self) -> dict[str, str | None]:
        """Returns the flag that asks for memory; a job without GPUs asks for as much as it would with them."""
        asked = self.asked
        mem, per_gpu = asked.mem_gb, asked.mem_per_gpu_gb
        if per_gpu is not None and not self.on_gpus:
            mem, per_gpu = per_gpu * self.shape.tasks_per_node, None
        sizes = {"mem": mem, "mem-per-gpu": per_gpu, "mem-per-cpu": asked.mem_per_cpu_gb}
        return {flag: f"{size}GB" if size else "0" for flag, size in sizes.items() if size is not None}


_LOG_START = "log_start=$(stat --dereference --format=%s /proc/self/fd/2)"
"""The size of the job's log before this attempt, which is appended to those before it.

After the site's own lines comes `set +e`: with `set -e` nothing would follow a srun that fails.
"""


def _after(folder: Path) -> str:
    """Returns a line of the script: what follows if srun has failed, or a task wishes it. It says how the job ends."""
    own_id = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"  # as in task.own_id
    wish = f"{shlex.quote(str(folder))}/{own_id}_{WISH}"
    # Not the profile's Python, which may be in a container without Slurm's tools.
    after = f"{shlex.quote(sys.executable)} -m slurm.after {shlex.quote(str(folder))} $code $log_start"
    return f"code=$?; [ $code = 0 ] && [ ! -e {wish} ] || exec {after}"
