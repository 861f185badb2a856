"""An audit as jobs, for the place where it runs. Importable without torch, picklable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jobs.audit import report
from jobs.audit.plan import Audit, Stretch
from jobs.health.watchdog import Watchdog
from jobs.runtime.job import IndependentJob
from jobs.runtime.signals import SignalWatch
from jobs.storage.faults import HANG

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind


@dataclass(frozen=True)
class AuditJob(IndependentJob):
    """Computes a stretch of a run again."""

    target: Audit
    stretch: Stretch
    processes: int
    device: "Kind"
    advice: ClassVar[str] = "Nothing is concluded."

    def work(self, signals: SignalWatch) -> int:
        from jobs.audit.compute import compute

        with Watchdog(self.stretch.again / HANG) as watchdog:
            compute(self.stretch, self.processes, self.device, signals, watchdog)
        return 0


@dataclass(frozen=True)
class ReportJob(IndependentJob):
    """Compares after the array of an audit has ended, well or badly; fails unless all is equal."""

    target: Audit

    def work(self, signals: SignalWatch) -> int:
        equal, text = report.conclude(self.target)
        print(text, flush=True)
        return 0 if equal else 1

    def lost(self, jobs: Sequence[AuditJob]) -> list[AuditJob]:
        """Returns those of the jobs whose stretch is not computed to its end."""
        return [job for job in jobs if not job.stretch.is_done()]
