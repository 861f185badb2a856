"""Ends a run, wherever it runs, until a person continues it."""

import os
import signal
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress

from diffusion.errors import OutsideError, UserError
from jobs.files import write_json
from jobs.storage import checkpoints, ownership
from jobs.storage.job_ids import elements
from jobs.storage.ownership import Ownership
from jobs.storage.records import now
from jobs.storage.run_folder import RunFolder, State
from jobs.watch import detail, states

PATIENCE_S = 60.0

Active = Callable[[Iterable[str]], Mapping[str, str]]
"""Those of the Slurm jobs that wait or run, with their states; elements of arrays by themselves."""


IsDue = Callable[[bool | None, Hashable], bool]
"""Whether to ask Slurm again, given what the run's files say (see `states.lives`), and which jobs are asked about."""


def cancel(
    run: RunFolder, active: Active, scancel: Callable[[list[str]], None], is_due: IsDue, say: Callable[[str], None]
) -> None:
    """Ends all jobs and processes of the run, waits until they have ended, and says how the run stands.

    Raises UserError if there is nothing to end, OutsideError if it does not end within a minute.
    """
    deadline = time.monotonic() + PATIENCE_S
    told: set[str | int] = set()
    jobs: dict[str, set[str]] = {}
    while True:
        too_late = time.monotonic() > deadline
        # A run that lives is no reason to ask Slurm: it has been told to end, or is about to be.
        lives = False if states.lives(run) is False else None
        # Looked up again, because a job may just have been queued again, even under another id.
        if is_due(lives, tuple(detail.all_jobs(run))) or too_late:
            jobs = _living_jobs(run, active)
            if again := [job_id for job_id, states in jobs.items() if job_id not in told or "PENDING" in states]:
                scancel(again)
        processes = ownership.holders(run.path)
        if not (jobs or processes or ownership.is_locked(run.path)):
            break
        if too_late:
            raise OutsideError(f"{run} has not ended within {PATIENCE_S:.0f} s; `status {run}` shows what is left")
        if not jobs and not processes and ownership.is_locked(run.path):
            raise OutsideError(f"{run} is held by a process that is not yours, or on another machine")
        for pid in set(processes) - told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not told:
            whom = [f"job {job_id}" for job_id in jobs] + [f"process {pid}" for pid in processes]
            say(f"Ending {', '.join(whom)}.")
        told |= {*jobs, *processes}
        time.sleep(1 if jobs else 0.1)
    if not told:
        raise UserError(f"{run} is not running: it is {states.summarize(run, {}).state}")
    _settle(run)
    say(_conclusion(run))


def _living_jobs(run: RunFolder, active: Active) -> dict[str, set[str]]:
    """Returns the run's jobs and arrays that wait or run, with the states of their tasks."""
    job_ids = detail.all_jobs(run)
    states = active(job_ids)
    living: dict[str, set[str]] = {}
    for job_id in job_ids:
        own = {states[task] for task in (job_id, *elements(job_id, states)) if task in states}
        if own:
            living[job_id] = own
    return living


def _settle(run: RunFolder) -> None:
    """Writes that the run is cancelled, if no process of it did: it waited, or was killed too early."""
    status = run.read_status()
    if status.get("state") in states.UNSETTLED:
        Ownership.take(run.path)  # on a node that has only lost its network somebody may still be writing
        write_json(run.status, {**status, "state": State.CANCELLED, "eta_s": None, "updated": now()})


def _conclusion(run: RunFolder) -> str:
    status, saved = run.read_status(), checkpoints.steps(run.checkpoints)
    of = f" of {status['total']:,}" if status.get("total") is not None else ""
    kept = f"its last checkpoint is of step {saved[0]:,}{of}" if saved else "it has no checkpoint"
    state = status.get("state", State.CANCELLED)
    go_on = "" if state == State.FINISHED else f" Continue with: python launch.py resume {run}"
    return f"{run} is {state}; {kept}.{go_on}"
