"""Jobs as values, which the launcher hands to the place where they run. Importable without torch, picklable.

All have what `slurm.place.Job` asks for: a call that does the work, `failed` and `submitted`.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.files import write_json
from jobs.ownership import Superseded
from jobs.reporting import now
from jobs.run_folder import RunFolder
from jobs.stop import SignalWatch, Stop
from jobs.tracking import following

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
        run.update_launch(job_ids=[*run.read_launch().get("job_ids", []), own])
    return job_id


@dataclass(frozen=True)
class SampleJob:
    """Draws shards of a set of samples, each process its part of them."""

    samples: "SampleSet"
    shards: tuple[int, ...]
    processes: int
    device: "Kind"
    merge: bool
    """Whether the process that finishes last merges; otherwise a `MergeJob` does it."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        with SignalWatch() as signals:
            try:
                from jobs.sample import Stopped, merge, sample

                mine = self.shards[process_rank() :: self.processes]
                with following(self.samples, process_rank() == 0 and (self.merge or 0 in mine), print):
                    try:
                        sample(self.samples, mine, self.device, signals, show_progress=process_rank() == 0)
                    except Stopped:
                        return stopped(signals.requested, requeue)
                    # Two processes that end together merge twice, into the same bytes.
                    if self.merge and not self.samples.missing() and not self.samples.is_complete():
                        merge(self.samples)
                return 0
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        return _submitted(self.samples, submit)


@dataclass(frozen=True)
class MergeJob:
    """Merges a set of samples after its array has ended, however it has ended; says what is missing if it must."""

    samples: "SampleSet"

    def __call__(self, requeue: Requeue | None = None) -> int:
        from jobs.sample import merge

        missing = self.samples.missing()
        if missing:
            print(
                f"{len(missing)} of {self.samples.num_shards} shards are missing: run the same `sample` command again."
            )
            return 1
        if not self.samples.is_complete():
            with following(self.samples, False, print):
                merge(self.samples)
        return 0

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        return _submitted(self.samples, submit)


def _submitted(samples: "SampleSet", submit: Callable[[], str]) -> str:
    """Records the job with the run, for `cancel`, and with the set, so that it is not drawn twice at once."""
    job_id = submit()
    run = RunFolder(samples.run)
    run.update_launch(sample_job_ids=[*run.read_launch().get("sample_job_ids", []), job_id])
    samples.add_job(job_id)
    return job_id


def stopped(reason: Stop, requeue: Requeue | None) -> int:
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
