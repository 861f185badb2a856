"""Jobs as values, which the launcher hands to the place where they run. Importable without torch, picklable.

All have what `slurm.place.Job` asks for: a call that does the work, `failed` and `submitted`.
"""

import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.files import write_json
from jobs.memory import keep_freed_memory
from jobs.ownership import Superseded
from jobs.reporting import now
from jobs.run_folder import RunFolder
from jobs.stop import SignalWatch, Stop, Stopped
from jobs.surroundings import undisturbed

if TYPE_CHECKING:
    from jobs.evaluation import Evaluation
    from jobs.numerics import Kind
    from jobs.samples import SampleSet

Requeue = Callable[[], str | None]
"""Queues the job again unless it has been cancelled; returns the id under which it comes back, None if it does not."""


class JobError(RuntimeError):
    """A failure that one sentence explains; no traceback is printed."""


@dataclass(frozen=True)
class TrainJob:
    """Trains a run."""

    run: Path
    processes: int
    device: "Kind"

    def __call__(self, requeue: Requeue | None = None) -> int:
        # DDP's C++ code warns about find_unused_parameters, which is set on purpose (see jobs/world.py).
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        keep_freed_memory()
        # Before anything slow: a signal that comes while torch is imported must not end the job unsaved.
        with undisturbed(), SignalWatch() as signals:
            try:
                from jobs.train import train

                return train(RunFolder(self.run), self.processes, self.device, signals, requeue)
            except Superseded as error:
                print(error, file=sys.stderr)
            except JobError as error:
                self.failed(process_rank(), str(error))
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        try:
            first = RunFolder(self.run).write_failure(rank, trace)
        except OSError as error:  # the disk may be full; then the terminal must do
            first, trace = True, f"{trace}\n(not recorded: {error})"
        # The processes that fail after the first one fail because it is gone: only its words help.
        if first:
            print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        return submit_runs([self.run], submit)


def submit_runs(folders: Sequence[Path], submit: Callable[[], str]) -> str:
    """Submits with `submit`, which returns the id of one job or of an array with one element for each run.

    All runs say that they are queued before a job can run and say otherwise. Returns the id.
    """
    runs = [RunFolder(folder) for folder in folders]
    before = [run.read_status() for run in runs]
    for run, status in zip(runs, before, strict=True):
        write_json(run.status, {**status, "state": "queued", "updated": now()})
    try:
        job_id = submit()
    except BaseException:
        for run, status in zip(runs, before, strict=True):
            write_json(run.status, {**status, "state": status.get("state", "failed"), "updated": now()})
        raise
    for i, run in enumerate(runs):
        own = job_id if len(runs) == 1 else f"{job_id}_{i}"
        run.add_job("job_ids", own)
    return job_id


class IndependentJob(ABC):
    """A job whose processes do not need each other: each does a share, and what one leaves undone another may do."""

    target: "SampleSet | Evaluation"
    """What it completes; keeps the ids of its jobs."""

    @abstractmethod
    def work(self, signals: SignalWatch) -> int:
        """Does this process's share and returns the exit code; may raise Stopped when a signal has come."""

    def around(self) -> AbstractContextManager[Any]:
        """What is entered before the work, and left only after a stopped job has been queued again."""
        return nullcontext()

    def __call__(self, requeue: Requeue | None = None) -> int:
        keep_freed_memory()
        with undisturbed(), SignalWatch() as signals:
            try:
                with self.around():
                    try:
                        return self.work(signals)
                    except Stopped:
                        return _stopped(signals.requested, requeue)
            except JobError as error:
                self.failed(process_rank(), str(error))
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        job_id = submit()
        self.target.add_job(job_id)
        return job_id


def _stopped(reason: Stop, requeue: Requeue | None) -> int:
    """Ends a job whose processes do not need each other, after a signal; returns the exit code."""
    if requeue is not None and reason is not Stop.INTERRUPT and (job_id := requeue()) is not None:
        print(f"Stopped; queued again as job {job_id}.", flush=True)
        return 0
    if process_rank() == 0:
        print("Stopped; the same command goes on from here.", file=sys.stderr, flush=True)
    return 130


def process_rank() -> int:
    """Which process of the job this is."""
    return int(os.environ.get("RANK", "0"))
