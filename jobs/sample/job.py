"""Drawing a set of samples as a job, for the place where it runs. Importable without torch, picklable."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from jobs.followers.start import following
from jobs.health.watchdog import END, Watchdog
from jobs.runtime.job import IndependentJob, process_rank
from jobs.runtime.signals import SignalWatch
from jobs.sample import exports
from jobs.sample.exports import Form
from jobs.sample.share import Share, not_given_up
from jobs.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind
    from jobs.sample.sample_set import SampleSet


def _following(target: "SampleSet", live: bool) -> AbstractContextManager[None]:
    return following(RunFolder(target.run), target.name, target.is_complete, live, print)


@dataclass(frozen=True)
class SampleJob(Share):
    """Draws shards of a set of samples, each process its part of them."""

    target: "SampleSet"
    shards: tuple[int, ...]
    processes: int
    device: "Kind"
    merge: bool
    """Whether the process that finishes last merges; otherwise a `SampleMergeJob` does it."""
    retries: int = 0
    export: Form | None = None
    """Another form in which the merged set is written, too."""
    advice: ClassVar[str] = "The same command draws what is missing."

    @property
    def name(self) -> str:
        return f"shard-{self.shards[0]}" if self.shards else "merging"

    @property
    def left(self) -> str:
        lacking = [shard for shard in self.shards if not self.target.has_shard(shard)]
        return f"{len(lacking)} shards from {lacking[0]} on" if lacking else "merging"

    def around(self) -> AbstractContextManager[None]:
        live = process_rank() == 0 and (self.merge or 0 in self.shards)  # in an array, one element
        return _following(self.target, live)

    def do(self, signals: SignalWatch, watchdog: Watchdog) -> None:
        from jobs.sample.draw import merge, sample

        # This job may have begun before, and a shard that lies there is whole.
        mine = [shard for shard in self.shards[process_rank() :: self.processes] if not self.target.has_shard(shard)]
        sample(self.target, mine, self.device, signals, watchdog)
        # Two processes that end together merge twice, into the same bytes. Whether one has merged, the command looks.
        if self.merge and not self.target.missing():
            watchdog.phase("merging", END)
            merge(self.target)
            exports.export(self.target, self.export)


@dataclass(frozen=True)
class SampleMergeJob(IndependentJob):
    """Merges a set of samples after its array has ended, well or badly; if shards are missing, says so."""

    target: "SampleSet"
    export: Form | None = None

    def around(self) -> AbstractContextManager[None]:
        return _following(self.target, live=False)

    def work(self, signals: SignalWatch) -> int:
        from jobs.sample.draw import merge

        missing = self.target.missing()
        if missing:
            print(f"{len(missing)} of {self.target.num_shards} shards are missing.", flush=True)
            return 1
        merge(self.target)
        exports.export(self.target, self.export)
        return 0

    def lost(self, jobs: Sequence[SampleJob]) -> list[SampleJob]:
        """Returns jobs that draw the shards that these have left undone, each its own, unless it was given up."""
        missing = set(self.target.missing())
        shares = [tuple(shard for shard in job.shards if shard in missing) for job in jobs]
        lost = [replace(job, shards=share) for job, share in zip(jobs, shares, strict=True) if share]
        return not_given_up(lost)
