"""What each task of a Slurm job does around the job itself: the environment, and queueing the job again."""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm import queue
from slurm.environment import outside_any_job


class Requeue:
    """Queues the job of this task again when it is called, unless the job has been cancelled."""

    def __init__(self, working_s: float) -> None:
        self._working_s, self._started = working_s, time.monotonic()
        self.came_back = False

    def __call__(self) -> str | None:
        """Returns the id under which the job comes back, None if it does not."""
        job_id = requeue()
        self.came_back |= job_id is not None
        return job_id

    def had_its_time(self) -> bool:
        """Whether the job stops because its time limit is near, rather than to make room for another one.

        Slurm sends the signal up to a minute early, and the task has started a little later than the job.
        """
        return time.monotonic() - self._started >= 0.9 * self._working_s - 60


Work = Callable[[Requeue], int]


class JobFailed(RuntimeError):
    """The job's exit code is not 0. It is raised so that Slurm sees it and ends the other tasks."""


@dataclass(frozen=True)
class SlurmTask:
    """Runs `work(requeue)` in a task that submitit has started; picklable, and the same again after every requeue.

    submitit's own handler for USR2 would requeue in the middle of a step, on one task alone. `work` installs its own
    handlers, so submitit's never runs. Its `checkpoint` is not needed, because all state is on disk.
    """

    work: Work
    working_s: float
    """Seconds from the job's start until its time limit makes it save."""

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        os.environ["MASTER_PORT"] = str(_master_port())
        # All GPUs of the node stay visible to each task, as Slurm gave them: Accelerate picks by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        _keep_evidence()
        again = Requeue(self.working_s)
        code = self.work(again)
        # Not after a failure: if Slurm starts the job again, that may help.
        if os.environ["SLURM_PROCID"] == "0" and code in (0, 130) and not again.came_back:
            stay_away()
        if code not in (0, 130):
            raise JobFailed(f"exit code {code}")


def _keep_evidence() -> None:
    """Makes NCCL say why it fails, and torch write what each process waited for when a collective timed out."""
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # By default the files, one for each rank, would lie on the compute node. Older versions of torch know only the
    # first of the two names.
    path = os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{_folder()}/{_job_id()}_nccl_rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", path)


def _folder() -> Path:
    """Returns submitit's folder, which is the run's slurm/."""
    return Path(os.environ["SUBMITIT_FOLDER"].replace("%j", _job_id()))


def _job_id() -> str:
    """Returns this job's id, ARRAY_INDEX in an array: there one element has the id of the whole array as its own."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _master_port() -> int:
    """Computes a port, the same in all tasks, and another one after each requeue.

    Processes of a node that Slurm took for dead may live on and still hold the port that they had.
    """
    attempt = f"{os.environ['SLURM_JOB_ID']}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    # Below the ports that the kernel hands out (from 32,768 on), one of which may be in use by anything.
    return random.Random(attempt).randrange(20_000, 32_768)


def requeue() -> str | None:
    """Queues this job again unless it has been cancelled; returns the id it comes back under, None if it does not.

    Only one task calls it, while the job still runs, whichever signal has come: before Slurm 24.05, a job that ends by
    itself in the grace time of a preemption counts as completed, and Slurm does not queue it again.
    """
    job_id = _job_id()
    if shutil.which("scontrol") is None:
        return _resubmit(job_id)
    before = _fields("job", job_id)
    if before.get("JobState") == "COMPLETING":
        # The job is ending already: Slurm itself has requeued it (then its end time is unknown), or it was cancelled.
        return job_id if before.get("EndTime") == "Unknown" else None
    if _comes_back_by_itself(before):
        return job_id
    # `incomplete`, because without it a job that is being cancelled would come back to life.
    subprocess.run(["scontrol", "requeue", "incomplete", job_id], check=False)
    after = _fields("job", job_id)
    came_back = after.get("Restarts") != before.get("Restarts") or after.get("JobState") == "PENDING"
    return job_id if came_back else _resubmit(job_id)


def _comes_back_by_itself(job: dict[str, str]) -> bool:
    """Whether Slurm queues this job again if it just ends: 24.05 and later do, in the grace time of a preemption.

    If they were also asked, they would do it twice: now, and when the job ends the next time (see `stay_away`).
    """
    if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1":
        return False
    config = queue.config(timeout_s=None)
    version = [int(part) for part in config.get("SLURM_VERSION", "").split(".")[:2] if part.isdecimal()]
    # Where a quality of service decides what a preemption does, a job cannot see that; then it asks for the requeue.
    by_partition = config.get("PreemptType") == "preempt/partition_prio"
    requeues = by_partition and _fields("partition", job.get("Partition", "")).get("PreemptMode") == "REQUEUE"
    # Slurm counts such an end as a failed launch, and holds the job for good after too many of them.
    launches = int(job.get("Restarts", "0")) + 2
    return version >= [24, 5] and requeues and launches <= int(config.get("MaxBatchRequeue", "5"))


def stay_away() -> None:
    """Tells Slurm not to bring this job back when it ends now.

    24.05 and later would, if the job has queued itself again in the grace time of an earlier preemption.
    """
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    if attempt == "0" or shutil.which("scontrol") is None:
        return
    job = _fields("job", _job_id())
    # If Slurm has taken this node for dead and started the job elsewhere, that one must still come back.
    if job.get("JobState") == "RUNNING" and job.get("Restarts") == attempt:
        subprocess.run(["scontrol", "update", f"JobId={_job_id()}", "Requeue=0"], check=False)


def _resubmit(job_id: str) -> str | None:
    """Submits the same job as a new one that waits for this one to end, where a job cannot be queued again.

    Returns the new job's id, None if that is not possible either.
    """
    script, pickle = (_folder() / f"{job_id}_{name}" for name in ("submission.sh", "submitted.pkl"))
    if shutil.which("sbatch") is None or not script.exists():
        print("the job cannot be queued again: there is neither scontrol nor sbatch on this node", flush=True)
        return None
    with outside_any_job():
        done = queue.ask("sbatch", "--parsable", f"--dependency=afterany:{job_id}", str(script), timeout_s=None)
    new_id = queue.submitted_id(done.stdout)
    if done.returncode != 0 or new_id is None:
        print(f"could not submit the job again: {queue.last_words(done.stdout + done.stderr)}", flush=True)
        return None
    for path in (script, pickle):
        shutil.copy2(path, path.with_name(path.name.replace(job_id, new_id, 1)))
    return new_id


def _fields(kind: str, name: str) -> dict[str, str]:
    """Asks for the fields of a job or a partition, named as by `scontrol show`; values end at the first space."""
    # Slurm's tools repeat their question while the controller is busy, and there is nothing better to do than to wait.
    shown = queue.ask("scontrol", "--oneliner", "show", kind, name, timeout_s=None).stdout
    record = re.search(r"^(?:JobId|PartitionName)=.*$", shown, re.MULTILINE)  # among a site's notices
    return dict(re.findall(r"([\w:/]+)=(\S*)", record[0])) if record is not None else {}
