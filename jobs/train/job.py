"""A training as a job, for the place where it runs. Importable without torch, picklable."""

import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import notify
from jobs.files import write_json
from jobs.health.watchdog import Watchdog
from jobs.runtime.job import Requeue, failure_of, process_node, process_rank
from jobs.runtime.malloc import importing, keep_freed_memory
from jobs.runtime.signals import SignalWatch
from jobs.runtime.surroundings import undisturbed
from jobs.storage import faults, job_ids
from jobs.storage.ownership import Superseded
from jobs.storage.records import append_timing, now
from jobs.storage.run_folder import RunFolder, State

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind

ComeBack = Callable[[Sequence[str]], str | None]
"""Queues a job again, without the nodes that are named; returns its id, None if that fails."""


@dataclass(frozen=True)
class TrainJob:
    """Trains a run."""

    run: Path
    processes: int
    device: "Kind"
    retries: int = 0
    """How often it is tried again after a fault that is not its own, without progress between."""
    begun: str = ""
    """When a job of this machine was started; a status that is older is that of the job before."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        keep_freed_memory()
        # Before anything slow: a signal that comes while torch is imported must not end the job unsaved.
        with undisturbed(), SignalWatch() as signals, Watchdog(self.run / faults.HANG, self._advice) as watchdog:
            try:
                with importing():
                    from jobs.train.loop import train

                return train(RunFolder(self.run), self.processes, self.device, signals, watchdog, requeue)
            except Superseded as error:
                print(error, file=sys.stderr)
            except Exception as error:
                failure = failure_of(error, watchdog.doing)
                if not failure.for_good and self.is_done(failure.trace.strip().splitlines()[-1]):
                    return 0 if self.processes == 1 else 1  # which ends the others; then who has started them asks
                if failure.for_good:
                    self.failed(process_rank(), failure.trace)
                else:
                    self._failed_here(failure.trace, outside=failure.outside)
        return 1

    @property
    def _advice(self) -> str:
        """What a person is told if the job hangs: nothing if it is tried again."""
        return "" if self.retries else f"Continue with: python launch.py resume {RunFolder(self.run)}"

    def failed(self, rank: int, trace: str) -> None:
        self._record(rank, trace, state=State.FAILED, for_good=True)

    def _failed_here(self, trace: str, *, outside: bool) -> None:
        """Records a failure of this process; `try_again_after` decides what follows, if the job may be tried again."""
        ended = {} if self.retries else {"state": State.FAILED}
        self._record(process_rank(), trace, outside=outside, node=process_node(), **ended)

    def is_done(self, cause: str | None) -> bool:
        run = RunFolder(self.run)
        *_, word = run.read_failure().get("traceback", "").strip().splitlines() or [faults.WITHOUT_A_WORD]
        cause = cause or word
        if not faults.finish(run, cause):
            return False
        print(
            f"{run} is finished all the same: {run.read_status().get('missing') or cause}", file=sys.stderr, flush=True
        )
        notify.tell(run, "finished", _say_aside)
        return True

    def try_again_after(
        self, cause: str | None, node: str | None, come_back: ComeBack | None, own: str | None = None
    ) -> bool:
        run = RunFolder(self.run)
        ids = run.read_launch().get("job_ids", [])
        if own in ids and ids[-1] != own:
            return False  # another job goes on with the run
        if _has_been_taken_over(run, on_slurm=come_back is not None):
            return False
        stays = come_back is None
        # Nobody would queue it again if the script of a Slurm job gave up.
        fault = faults.patiently(
            lambda: faults.judge(run, self.retries, cause, node, self.begun, stays=stays), long=not stays
        )
        if fault is None:
            return False
        then = "The job is tried again." if fault.again else f"Continue with: python launch.py resume {run}"
        print(f"{fault.cause}. {then}", file=sys.stderr, flush=True)
        if fault.hang is not None:
            with suppress(OSError):  # the disk may be full again
                append_timing(run, {"event": "hung", "seconds": fault.silent_s})
            notify.tell(run, "hung", _say_aside, fault.cause)
        if not fault.again or come_back is None:
            if not fault.again:
                notify.tell(run, "failed", _say_aside, fault.cause)
            return fault.again
        job_id = come_back(fault.left_out)
        if job_id is None:
            faults.fail(run, f"{fault.traceback or ''}\n{fault.cause}; the job could not be queued again".lstrip())
            notify.tell(run, "failed", _say_aside, fault.cause)
        else:
            self.comes_back_as(job_id)
        return job_id is not None

    def comes_back_as(self, job_id: str) -> None:
        run = RunFolder(self.run)
        if job_id not in run.read_launch().get("job_ids", []):
            run.add_job("job_ids", job_id)

    def _record(self, rank: int, trace: str, **facts: Any) -> None:
        try:
            first = RunFolder(self.run).write_failure(rank, trace, **facts)
        except OSError as error:  # the disk may be full; then the terminal must do
            first, trace = True, f"{trace}\n(not recorded: {error})"
        # Later failures follow from the first one, so only the first traceback is printed.
        if first:
            print(trace, file=sys.stderr, flush=True)
            notify.tell(RunFolder(self.run), "failed", _say_aside)

    def submitted(self, submit: Callable[[], str]) -> str:
        return submit_runs([self.run], submit)


def _say_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _has_been_taken_over(run: RunFolder, *, on_slurm: bool) -> bool:
    """Whether a job somewhere else goes on with the run, so that this one must not come back."""
    status = run.read_status()
    if status.get("state") != State.RUNNING:
        return False
    return status["on_slurm"] != on_slurm or (not on_slurm and status["host"] != platform.node())


def submit_runs(folders: Sequence[Path], submit: Callable[[], str]) -> str:
    """Submits with `submit`, which returns the id of one job or of an array with one element for each run.

    Each run's status is set to queued before, because a job that starts at once writes its own. Returns the id.
    """
    runs = [RunFolder(folder) for folder in folders]
    before = [run.read_status() for run in runs]
    try:
        for run, status in zip(runs, before, strict=True):
            append_timing(run, {"event": State.QUEUED, **({"heard": status["updated"]} if "updated" in status else {})})
            write_json(run.status, {**status, "state": State.QUEUED, "updated": now()})
        job_id = submit()
    except BaseException:  # Ctrl-C, too: a run without a job must not be called queued
        for run, status in zip(runs, before, strict=True):
            with suppress(OSError):  # the disk may be full, which is then what there is to say
                write_json(run.status, {**status, "state": status.get("state", State.FAILED), "updated": now()})
        raise
    for i, run in enumerate(runs):
        own = job_id if len(runs) == 1 else job_ids.element(job_id, i)
        # The job waits or runs, and without its id nobody could cancel it.
        faults.patiently(partial(run.add_job, "job_ids", own))
    return job_id
