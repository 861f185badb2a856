"""What each task of a Slurm job does around the job itself: the environment, and queueing the job again."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from slurm import queue
from slurm.environment import network, outside_any_job

WISH = "requeue"


class Requeue:
    """Queues the job of this task again when it is called, unless the job has been cancelled.

    In a container, which has none of Slurm's tools, the job's script does it afterwards (slurm/after.py); and where the
    controller does not answer, because the script can wait for it.
    """

    def __init__(self, working_s: float, cluster: str | None = None) -> None:
        self._working_s, self._started, self._cluster = working_s, time.monotonic(), cluster
        self.came_back = False

    def __call__(self) -> str | None:
        """Returns the id under which the job comes back, None if it does not."""
        has_tools = shutil.which("scontrol") is not None or shutil.which("sbatch") is not None
        try:
            job_id = requeue() if has_tools else self._by_the_script()
        except queue.Unanswered as error:
            print(f"{error}; the job's script asks again", file=sys.stderr, flush=True)
            job_id = self._by_the_script()
        self.came_back |= job_id is not None
        return None if job_id is None else queue.on_cluster(self._cluster, job_id)

    def _by_the_script(self) -> str:
        wish().touch()
        return own_id()

    def had_its_time(self) -> bool:
        """Whether the job stops because its time limit is near, rather than to make room for another one.

        Slurm sends the signal up to a minute early, and the task has started a little later than the job.
        """
        return time.monotonic() - self._started >= 0.9 * self._working_s - 60


Work = Callable[[Requeue], int]


@runtime_checkable
class Retried(Protocol):
    """A job that may be tried again after its processes have ended badly."""

    retries: int
    """How often, without progress between; 0 is never."""

    def comes_back_as(self, job_id: str) -> None:
        """Records under which id the job is queued again."""

    def is_done(self, cause: str | None) -> bool:
        """Whether all is done that matters, so that the job has ended well although its processes have not."""

    def try_again_after(
        self,
        cause: str | None,
        node: str | None,
        come_back: Callable[[Sequence[str]], str | None] | None,
        own: str | None = None,
    ) -> bool:
        """Decides whether the job is tried again, records why, and if so calls `come_back`; returns whether it is.

        `cause` is what is known of the end from outside, and `node` where it began. `come_back` is given the nodes that
        are to be left out; it returns the job's new id, and None if the job cannot come back. Without `come_back` the
        caller starts the job again. `own` is the job's id: if a newer job has followed it, it is not tried again.
        """


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
    cluster: str | None = None
    """The cluster by name, where there are several."""
    host_suffix: str = ""
    """What makes a node's name that of its fast network."""
    interface: str | None = None
    """The network interface to use; auto finds the fast ones."""

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        os.environ["MASTER_PORT_FILE"] = _port_file()
        # All GPUs of the node stay visible to each task, as Slurm gave them: Accelerate picks by LOCAL_RANK.
        # overwrite: sbatch hands on the user's variables, and submitit would fail over a RANK among them.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["MASTER_ADDR"] += self.host_suffix
        if self.interface is not None:
            os.environ.update(network(self.interface))
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        _keep_evidence()
        if os.environ["SLURM_PROCID"] == "0":
            wish().unlink(missing_ok=True)  # of an attempt whose script did not come so far
        again = Requeue(self.working_s, self.cluster)
        code = self.work(again)
        # Not after a failure: if Slurm starts the job again, that may help.
        if os.environ["SLURM_PROCID"] == "0" and code in (0, 130) and not again.came_back:
            stay_away()
        if code not in (0, 130):
            raise JobFailed(f"exit code {code}")


def _keep_evidence() -> None:
    """Makes NCCL say why it fails, and torch write what each process waited for when a collective failed."""
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # By default the files, one for each rank, would lie on the compute node. Older versions of torch know only the
    # first of the two names.
    path = os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{_folder()}/{own_id()}_nccl_rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", path)


def _folder() -> Path:
    """Returns submitit's folder, which is the run's slurm/."""
    return Path(os.environ["SUBMITIT_FOLDER"].replace("%j", own_id()))


def own_id() -> str:
    """Returns this job's id, ARRAY_INDEX in an array: there one element has the id of the whole array as its own."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _own_start() -> str:
    """Returns how often Slurm had started this job before, as `scontrol` shows it under Restarts."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def wish() -> Path:
    """Returns the file by which a task asks the job's script to queue the job again."""
    return _folder() / f"{own_id()}_{WISH}"


def _port_file() -> str:
    """Returns the file in which process 0 names the port that the processes meet at: another one for each start.

    Processes of a node that Slurm took for dead may live on.
    """
    start = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    return f"{_folder()}/{own_id()}_port_{'_'.join(start)}"


def requeue(left_out: Sequence[str] = ()) -> str | None:
    """Queues this job again unless it has been cancelled; returns the id it comes back under, None if it does not.

    It does not come back to the nodes that are `left_out`, unless it could not run without them.

    Only one task calls it, while the job still runs, whichever signal has come: before Slurm 24.05, a job that ends by
    itself in the grace time of a preemption counts as completed, and Slurm does not queue it again.
    Raises Unanswered where the controller does not say whether it has.
    """
    job_id = own_id()
    if shutil.which("scontrol") is None:
        return _resubmit(job_id, left_out)
    before = _fields("job", job_id)
    if before.get("Restarts", _own_start()) != _own_start():
        return job_id  # a newer start goes on already: Slurm may have taken this node for dead meanwhile
    if before.get("JobState") == "COMPLETING":
        # The job is ending already: Slurm itself has requeued it (then its end time is unknown), or it was cancelled.
        return job_id if before.get("EndTime") == "Unknown" else None
    if _comes_back_by_itself(before):
        return job_id
    # `incomplete`, because without it a job that is being cancelled would come back to life.
    _tell("requeue", "incomplete", job_id)
    # Whatever scontrol said: if its answer was lost, the job may have been queued again all the same.
    after = _fields("job", job_id)
    came_back = after.get("Restarts") != before.get("Restarts") or after.get("JobState") == "PENDING"
    if not came_back:
        return _resubmit(job_id, left_out)
    if left_out and not _has_enough_without(left_out, before):
        print(f"{', '.join(left_out)} cannot be left out: the partition has too few other nodes", flush=True)
    elif left_out:
        # Only now, because Slurm changes this of a waiting job alone.
        known = [nodes for nodes in [before.get("ExcNodeList", "(null)")] if nodes != "(null)"]
        excluded = ",".join([*known, *left_out])
        _tell("update", f"JobId={job_id}", f"ExcNodeList={excluded}")
    return job_id


def _tell(*command: str) -> None:
    """Has scontrol do something, and prints what goes wrong."""
    print(queue.insist("scontrol", *command).stderr, end="", file=sys.stderr, flush=True)


def _has_enough_without(left_out: Sequence[str], job: dict[str, str]) -> bool:
    """Whether the job's partition has enough nodes besides these; if not, the job would wait for ever."""
    command = ["sinfo", "--noheader", "--Node", "--responding", f"--partition={job.get('Partition')}", "--format=%N"]
    shown = queue.insist(*command).stdout
    return len(set(shown.split()) - set(left_out)) >= int(job.get("NumNodes", "1").partition("-")[0])


def is_current() -> bool:
    """Whether this job runs as Slurm knows it: not cancelled, not queued again, not started a second time elsewhere.

    True where that cannot be asked, or is not answered.
    """
    if shutil.which("scontrol") is None:
        return True
    try:
        job = _fields("job", own_id())
    except queue.Unanswered:
        return True
    return job.get("JobState") == "RUNNING" and job.get("Restarts") == _own_start()


def _comes_back_by_itself(job: dict[str, str]) -> bool:
    """Whether Slurm queues this job again if it just ends: 24.05 and later do, in the grace time of a preemption.

    If they were also asked, they would do it twice: now, and when the job ends the next time (see `stay_away`).
    """
    if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1":
        return False
    config = queue.config(ask=queue.insist)
    version = [int(part) for part in config.get("SLURM_VERSION", "").split(".")[:2] if part.isdecimal()]
    # Where a quality of service decides what a preemption does, a job cannot see that; then it asks for the requeue.
    by_partition = config.get("PreemptType") == "preempt/partition_prio"
    requeues = by_partition and _fields("partition", job.get("Partition", "")).get("PreemptMode") == "REQUEUE"
    # Slurm counts such an end as a failed launch, and holds the job for good after too many of them.
    # The first launch is no restart, and the next one counts as well.
    launches = int(job.get("Restarts", "0")) + 2
    return version >= [24, 5] and requeues and launches <= int(config.get("MaxBatchRequeue", "5"))


def stay_away() -> None:
    """Tells Slurm not to bring this job back when it ends now.

    24.05 and later would, if the job has queued itself again in the grace time of an earlier preemption.
    """
    attempt = _own_start()
    if attempt == "0" or shutil.which("scontrol") is None:
        return
    try:
        job = _fields("job", own_id())
    except queue.Unanswered as error:
        print(error, file=sys.stderr, flush=True)
        return
    # If Slurm has taken this node for dead and started the job elsewhere, that one must still come back.
    if job.get("JobState") == "RUNNING" and job.get("Restarts") == attempt:
        _tell("update", f"JobId={own_id()}", "Requeue=0")


def _resubmit(job_id: str, left_out: Sequence[str]) -> str | None:
    """Submits the same job as a new one that waits for this one to end, where a job cannot be queued again.

    Returns the new job's id, None if that is not possible either. An element of an array comes back as an array of one.
    """
    array, _, index = job_id.partition("_")
    script, pickle = _folder() / f"{array}_submission.sh", _folder() / f"{job_id}_submitted.pkl"
    if shutil.which("sbatch") is None or not script.exists():
        print("the job cannot be queued again: there is neither scontrol nor sbatch on this node", flush=True)
        return None
    # A flag of the command line replaces the script's, so what the profile leaves out is said again.
    asked = re.findall(r"^#SBATCH --exclude=(\S+)$", script.read_text(), re.MULTILINE)
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job_id}", *([f"--array={index}"] if index else [])]
    with outside_any_job():
        # If Slurm refuses the job without those nodes, it may come back to them.
        for without in ([f"--exclude={','.join([*asked, *left_out])}"], []) if left_out else ([],):
            number, said = _submit_once(job_id, script, *command, *without)
            if number != "":
                break
    if not number:
        print(f"could not submit the job again: {said}", flush=True)
        return None
    new_id = f"{number}_{index}" if index else number
    # The new job looks for its pickle under its own id, and for the script if it has to come back in this way again.
    shutil.copy2(script, script.with_name(f"{number}_submission.sh"))
    shutil.copy2(pickle, pickle.with_name(f"{new_id}_submitted.pkl"))
    return new_id


def _submit_once(job_id: str, script: Path, *command: str) -> tuple[str | None, str]:
    """Submits the script of a job that waits for this one to end; returns its id, "" if Slurm refuses it, and why.

    If no answer comes, the job may have been submitted all the same. It is not submitted again before squeue has told
    that it has not; None if squeue is missing on this node or tells nothing. Raises Unanswered if time is up.
    """
    deadline = time.monotonic() + queue.PATIENCE_S
    waiting = queue.waits_for(job_id, script.name)  # since an attempt whose answer did not come
    while not waiting:
        done = queue.insist(*command, str(script), when=queue.UNREACHED)
        said = queue.last_words(done.stdout + done.stderr)
        if queue.is_away(done, queue.UNREACHED):
            raise queue.Unanswered(f"sbatch: {said}")
        if not queue.is_away(done):
            return (queue.submitted_id(done.stdout) or "") if done.returncode == 0 else "", said
        time.sleep(queue.AGAIN_S)
        if (waiting := queue.waits_for(job_id, script.name)) is None:
            return None, said
        if time.monotonic() > deadline:
            raise queue.Unanswered(f"sbatch: {said}")
    return waiting, ""


def _fields(kind: str, name: str) -> dict[str, str]:
    """Asks for the fields of a job or a partition, named as by `scontrol show`; values end at the first space.

    {} if Slurm knows none of that name; raises Unanswered if it does not answer.
    """
    done = queue.insist("scontrol", "--oneliner", "show", kind, name)
    if queue.is_away(done):
        raise queue.Unanswered(f"scontrol: {queue.last_words(done.stdout + done.stderr)}")
    shown = done.stdout
    record = re.search(r"^(?:JobId|PartitionName)=.*$", shown, re.MULTILINE)  # among a site's notices
    fields = re.findall(r"([\w:/]+)=(\S*)", record[0]) if record is not None else []
    return dict(reversed(fields))  # the first of a name counts: from 25.11 on, the user's command line comes last
