"""A training as a job, for the place where it runs. Importable without torch, picklable."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.errors import UserError
from jobs import notify
from jobs.files import write_json
from jobs.runtime.job import JobError, Requeue, process_rank
from jobs.runtime.malloc import keep_freed_memory
from jobs.runtime.signals import SignalWatch
from jobs.runtime.surroundings import undisturbed
from jobs.storage import job_ids
from jobs.storage.ownership import Superseded
from jobs.storage.records import now
from jobs.storage.run_folder import RunFolder, State

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind


@dataclass(frozen=True)
class TrainJob:
    """Trains a run."""

    run: Path
    processes: int
    device: "Kind"

    def __call__(self, requeue: Requeue | None = None) -> int:
        # DDP's C++ code warns about find_unused_parameters, which is set on purpose (see jobs/runtime/world.py).
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        keep_freed_memory()
        # Before anything slow: a signal that comes while torch is imported must not end the job unsaved.
        with undisturbed(), SignalWatch() as signals:
            try:
                from jobs.train.loop import train

                return train(RunFolder(self.run), self.processes, self.device, signals, requeue)
            except Superseded as error:
                print(error, file=sys.stderr)
            except (UserError, JobError) as error:
                self.failed(process_rank(), str(error))
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        try:
            first = RunFolder(self.run).write_failure(rank, trace)
        except OSError as error:  # the disk may be full; then the terminal must do
            first, trace = True, f"{trace}\n(not recorded: {error})"
        # Later failures follow from the first one, so only the first traceback is printed.
        if first:
            print(trace, file=sys.stderr, flush=True)
            notify.tell(RunFolder(self.run), "failed", lambda text: print(text, file=sys.stderr, flush=True))

    def submitted(self, submit: Callable[[], str]) -> str:
        return submit_runs([self.run], submit)


def submit_runs(folders: Sequence[Path], submit: Callable[[], str]) -> str:
    """Submits with `submit`, which returns the id of one job or of an array with one element for each run.

    Each run's status is set to queued before, because a job that starts at once writes its own. Returns the id.
    """
    runs = [RunFolder(folder) for folder in folders]
    before = [run.read_status() for run in runs]
    for run, status in zip(runs, before, strict=True):
        write_json(run.status, {**status, "state": State.QUEUED, "updated": now()})
    try:
        job_id = submit()
    except BaseException:
        for run, status in zip(runs, before, strict=True):
            write_json(run.status, {**status, "state": status.get("state", State.FAILED), "updated": now()})
        raise
    for i, run in enumerate(runs):
        own = job_id if len(runs) == 1 else job_ids.element(job_id, i)
        run.add_job("job_ids", own)
    return job_id
