"""Jobs as values, which the launcher hands to the place where they run. Importable without torch, picklable.

All have what `slurm.place.Job` asks for: a call that does the work, `failed` and `submitted`.
"""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.files import write_json
from jobs.ownership import Superseded
from jobs.reporting import now
from jobs.run_folder import RunFolder
from jobs.stop import SignalWatch

if TYPE_CHECKING:
    from jobs.samples import SampleSet
    from jobs.world import Kind

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
        # Before anything slow: a signal that comes while torch is imported must not end the job unsaved.
        with SignalWatch() as signals:
            try:
                from jobs.train import train

                return train(RunFolder(self.run), self.processes, self.device, signals, requeue)
            except Superseded as error:
                print(error, file=sys.stderr)
            except JobError as error:
                self.failed(_rank(), str(error))
            except Exception:
                self.failed(_rank(), traceback.format_exc())
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
        run = RunFolder(self.run)
        before = run.read_status()
        # Before the job can run and say otherwise.
        write_json(run.status, {**before, "state": "queued", "updated": now()})
        try:
            job_id = submit()
        except BaseException:
            write_json(run.status, {**before, "state": before.get("state", "failed"), "updated": now()})
            raise
        run.update_launch(job_ids=[*run.read_launch().get("job_ids", []), job_id])
        return job_id


@dataclass(frozen=True)
class SampleJob:
    """Draws what is missing of a set of samples, each process its share; whoever finishes last merges."""

    samples: "SampleSet"
    processes: int
    device: "Kind"

    def __call__(self, requeue: Requeue | None = None) -> int:
        try:
            from jobs.sample import sample

            return sample(self.samples, _rank(), self.processes, self.device)
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
            return 130
        except Exception:
            self.failed(_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        job_id = submit()
        run = RunFolder(self.samples.run)
        run.update_launch(sample_job_ids=[*run.read_launch().get("sample_job_ids", []), job_id])
        return job_id


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
