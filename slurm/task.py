"""What each task of a Slurm job does around the job itself: the environment, and queueing the job again."""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Requeue = Callable[[], str | None]
Work = Callable[[Requeue], int]


class JobFailed(RuntimeError):
    """The job's exit code is not 0; raised so that Slurm sees it and ends the other tasks."""


@dataclass(frozen=True)
class SlurmTask:
    """Runs `work(requeue)` in a task that submitit has started; picklable, and the same again after every requeue.

    submitit's own handler for USR2 would requeue from within a step, on one task alone. `work` installs handlers of its
    own, so that handler never runs, and `checkpoint` is not needed: all state is on disk.
    """

    work: Work

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        os.environ["MASTER_PORT"] = str(_master_port())
        # All GPUs of the node stay visible to each task, as Slurm gave them: Accelerate picks by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        code = self.work(requeue)
        if code not in (0, 130):
            raise JobFailed(f"exit code {code}")


def _job_id() -> str:
    """This job's id; of an array's element as ARRAY_INDEX, for one of them bears the id of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _master_port() -> int:
    """A port that all tasks derive alike, and another one after each requeue.

    Processes of a node that Slurm took for dead may live on and still hold the port that they had.
    """
    attempt = f"{os.environ['SLURM_JOB_ID']}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return random.Random(attempt).randrange(20_000, 60_000)


def requeue() -> str | None:
    """Queues this job again unless it has been cancelled; returns the id it comes back under, None if it does not.

    To be called by one task while the job lives, whichever signal has come: a job that ends by itself in the grace time
    of a preemption counts as completed, and Slurm does not bring it back.
    """
    job_id = _job_id()
    if shutil.which("scontrol") is None:
        return _resubmit(job_id)
    before = _fields(job_id)
    if before.get("JobState") == "COMPLETING":
        # Somebody was faster: Slurm itself has requeued it (then the end is open), or it has been cancelled.
        return job_id if before.get("EndTime") == "Unknown" else None
    # `incomplete`, for without it a job that is being cancelled would come back to life.
    subprocess.run(["scontrol", "requeue", "incomplete", job_id], check=False)
    after = _fields(job_id)
    came_back = after.get("Restarts") != before.get("Restarts") or after.get("JobState") == "PENDING"
    return job_id if came_back else _resubmit(job_id)


def _resubmit(job_id: str) -> str | None:
    """Submits the same job as a new one that waits for this one to end, where a job cannot be queued again.

    Returns the new job's id, None if that is not possible either.
    """
    folder = Path(os.environ["SUBMITIT_FOLDER"].replace("%j", job_id))
    script, pickle = folder / f"{job_id}_submission.sh", folder / f"{job_id}_submitted.pkl"
    if shutil.which("sbatch") is None or not script.exists():
        print("the job cannot be queued again: there is neither scontrol nor sbatch on this node", flush=True)
        return None
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job_id}", str(script)]
    # Without this job's own variables, which sbatch would read as options.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"could not submit the job again: {done.stderr.strip()}", flush=True)
        return None
    new_id = done.stdout.strip().split(";")[0]
    for path in (script, pickle):
        shutil.copy2(path, path.with_name(path.name.replace(job_id, new_id, 1)))
    return new_id


def _fields(job_id: str) -> dict[str, str]:
    """The job's fields as `scontrol show job` names them."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(re.findall(r"([\w:/]+)=(\S*)", shown))
