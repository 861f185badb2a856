"""Whether a run lives, and why not: from its folder and from what Slurm says of its job."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from diffusion.errors import UserError
from jobs.files import now_in
from jobs.storage import checkpoints, faults, ownership
from jobs.storage.run_folder import RunFolder, State
from jobs.terminal import tables

UNSETTLED = (State.QUEUED, State.RUNNING, State.REQUEUED)
"""States that a living job is going to change."""
SILENT_S = 120.0
"""The user is told about a heartbeat that is older than this."""
BEAT_S = 30.0
"""A heartbeat that is younger shows a living run."""
SUBMITTING_S = 10.0
"""A run is marked queued before Slurm knows its job; for this long it is not reported as dead."""
ENDING_S = 10.0
"""A process may exit this long after its final status; a lock held longer belongs to a restarted one."""
TELLING = ("OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
"""These states of Slurm say more about a failure than the run's own last line does."""


class SlurmJob(Protocol):
    """What Slurm says of a job."""

    @property
    def phase(self) -> Literal["waiting", "running", "ended"]: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def nodes(self) -> str: ...
    @property
    def signal(self) -> str: ...


Jobs = Mapping[str, SlurmJob]
"""What Slurm says of jobs, by id; jobs that it has forgotten are not in it."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One run at this moment."""

    run: str
    """EXPERIMENT/NAME."""
    path: str
    state: str
    """As in status.json, but true: a run whose processes are gone is not running. `created` before its first start."""
    reason: str
    step: int
    total: int | None
    loss: float | None
    rate_images_per_s: float | None
    eta_s: float | None
    restarts: int
    nodes: str
    job_id: str | None
    updated: str
    heartbeat_age_s: float | None


def newest_jobs(runs: Iterable[RunFolder]) -> list[str]:
    """Ids of the jobs that Slurm must be asked about before the runs can be judged."""
    unfinished = [run for run in runs if read_status(run).get("state") != State.FINISHED]
    return [job_id for run in unfinished if (job_id := newest_job(read_launch(run))) is not None]


def summarize(run: RunFolder, jobs: Jobs | None) -> Overview:
    """Describes the run, given what Slurm says of its newest job; `jobs` is None if Slurm does not answer.

    Ask Slurm first, then call this: a job that has ended in between has written its final status already.
    """
    status, launch = read_status(run), read_launch(run)
    job_id = newest_job(launch)
    job = jobs.get(job_id) if jobs is not None and job_id is not None else None
    host = launch.get("host")
    if status.get("on_slurm") is False and status.get("state") != State.QUEUED:  # whatever jobs it had before
        host, job = status.get("host"), job if job is not None and job.phase != "ended" else None
    is_held = ownership.is_locked(run.path)
    # The kernel knows who lives: that counts more than what files or Slurm say.
    if is_held:
        state, reason = _judge_held(status)
    else:
        unseen = host if is_held is None or host != platform.node() else None
        state, reason = _judge(status, job, unseen, is_known=job_id is None or jobs is not None)
        # Its files do not say yet that it has failed: whoever judges the hang has not been there.
        if state == State.FAILED and state != status.get("state") and (hang := faults.new_hang(run.path)) is not None:
            reason = f"{faults.describe_hang(hang)[0]}; stacks in {faults.HANG}/{hang.name}"
        # Whatever has ended it while it drew figures, and whoever could not write that down any more.
        if state == State.FAILED and status.get("state") in UNSETTLED and _has_last_step(run):
            state, reason = State.FINISHED, "figures and final numbers are missing; the same command draws them"
    alive = state == State.RUNNING
    return Overview(
        run=run.label,
        path=str(run),
        state=state,
        reason=reason,
        step=status.get("step", 0),
        total=status.get("total"),
        loss=status.get("loss"),
        rate_images_per_s=status.get("rate_images_per_s") if alive else None,
        eta_s=status.get("eta_s") if alive else None,
        restarts=max(0, status.get("restarts", 0)),
        nodes=job.nodes if job is not None else "",
        job_id=job_id,
        updated=str(status.get("updated") or launch.get("created", "")),
        heartbeat_age_s=_age_s(status),
    )


def lives(run: RunFolder) -> bool | None:
    """What the run's own files say of it: that it lives or has ended; None if they do not tell."""
    status = read_status(run)
    if status.get("state") not in UNSETTLED:
        return False
    age_s = _age_s(status)
    return True if status["state"] == State.RUNNING and age_s is not None and age_s < BEAT_S else None


def beats(run: RunFolder) -> bool:
    """Whether the run has just given a sign of life, also by its disk's clock: those of two machines may differ."""
    if lives(run) is not None or read_status(run)["state"] != State.RUNNING:
        return lives(run) is True
    try:
        return now_in(run.path) - run.status.stat().st_mtime < BEAT_S
    except OSError:
        return False


def is_alive(run: RunFolder, jobs: Jobs | None) -> bool:
    """Whether the run waits, runs or is coming to an end somewhere."""
    job = (jobs or {}).get(newest_job(read_launch(run)) or "")
    on_slurm = job is not None and job.phase != "ended"
    return on_slurm or ownership.is_locked(run.path) or summarize(run, jobs).state in UNSETTLED


def _judge_held(status: dict[str, Any]) -> tuple[str, str]:
    """(state, reason) of a run that a process of this machine holds."""
    state, age_s = status.get("state", State.CREATED), _age_s(status)
    if state not in UNSETTLED and age_s is not None and age_s < ENDING_S:
        return state, "ending"
    return State.RUNNING, _silence(status)


def _judge(status: dict[str, Any], job: SlurmJob | None, unseen: str | None, is_known: bool) -> tuple[str, str]:
    """(state, reason) of a run that nobody is seen to hold: what status.json says, corrected by who is alive.

    `unseen` is another machine, on which a process may hold it all the same; None if there is none.
    """
    state = status.get("state", State.CREATED)
    age_s = _age_s(status)
    if job is not None and job.phase == "waiting":
        return State.QUEUED if state == State.QUEUED else State.REQUEUED, job.reason
    if job is not None and job.phase == "running" and state in UNSETTLED:
        return State.RUNNING, _silence(status)
    if state == State.FAILED:
        last_line = str(status.get("traceback") or "").strip().rpartition("\n")[2].strip()
        return state, job.state if job is not None and job.state in TELLING else last_line
    if state not in UNSETTLED:
        return state, ""
    if not is_known:
        return state, "Slurm does not answer"
    if state == State.QUEUED and age_s is not None and age_s < SUBMITTING_S:
        return state, "being submitted"
    # Not every file system shows here that a process on another machine holds the lock.
    if job is None and unseen is not None and age_s is not None and age_s < SILENT_S:
        return state, f"on {unseen}"
    return _death(job)


def _death(job: SlurmJob | None) -> tuple[str, str]:
    """(state, reason) of a run whose status says that it lives, though it does not."""
    if job is None:
        return State.FAILED, faults.WITHOUT_A_WORD
    if job.state == "CANCELLED":
        return State.CANCELLED, ""
    if job.state in TELLING:
        return State.FAILED, job.state
    return State.FAILED, f"killed by {job.signal}" if job.signal else faults.WITHOUT_A_WORD


def _has_last_step(run: RunFolder) -> bool:
    """Whether the last step is saved; the file is not read, because a table of runs must come at once."""
    try:
        # Not as of the last heartbeat: a run that is to train on may have died before its first.
        return run.read_experiment()[1].train.steps in checkpoints.steps(run.checkpoints) and not run.read_failure()
    except (OSError, UserError):
        return False


def _silence(status: dict[str, Any]) -> str:
    """A remark on a living run: that it starts, or how long it has been silent."""
    if status.get("state") != State.RUNNING:
        return "starting"
    age_s = _age_s(status)
    return f"silent for {tables.duration(age_s)}" if age_s is not None and age_s > SILENT_S else ""


def _age_s(status: dict[str, Any]) -> float | None:
    """Seconds since the last heartbeat; None before the first."""
    updated = status.get("updated")
    if updated is None:
        return None
    # Another machine wrote it, whose clock may be ahead of this one.
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(updated)).total_seconds())


def newest_job(launch: dict[str, Any]) -> str | None:
    """The id of the newest of a run's jobs, None if it has none."""
    newest: str | None = (launch.get("job_ids") or [None])[-1]
    return newest


def read_status(run: RunFolder) -> dict[str, Any]:
    """Reads status.json; if it cannot be read, that run has failed, and the list of all runs goes on."""
    try:
        status = run.read_status()
        for name in ("step", "total", "loss", "held_out_loss", "rate_images_per_s", "eta_s", "restarts"):
            if not isinstance(status.get(name), int | float | None):
                raise UserError(f"{name} in {run.status} must be a number; got {status[name]!r}")
        if not isinstance(status.get("state", ""), str):
            raise UserError(f"state in {run.status} must be a word; got {status['state']!r}")
        _age_s(status)
        return status
    except (OSError, UserError, ValueError, TypeError) as error:
        return {"state": State.FAILED, "traceback": str(error)}


def read_launch(run: RunFolder) -> dict[str, Any]:
    """Reads launch.json; {} if it cannot be read."""
    try:
        return run.read_launch()
    except (OSError, UserError):
        return {}
