"""A share of the work on a set of samples, as a job that is tried again after a fault of the machine.

Importable without torch.
"""

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from jobs.health.watchdog import Watchdog
from jobs.runtime.job import Failure, IndependentJob, failure_of, process_node, process_rank
from jobs.runtime.signals import SignalWatch, Stopped
from jobs.storage import faults


class Share(IndependentJob):
    """Does a share, which no other job of the same set has, in one process or several."""

    retries: int
    """How often it is tried again after a fault that is not its own, without progress between."""
    advice: ClassVar[str]
    """What a person is told if it is given up."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Names the share among those of the set."""

    @property
    @abstractmethod
    def left(self) -> str:
        """Says what is still to be done, in other words after each progress."""

    @abstractmethod
    def do(self, signals: SignalWatch, watchdog: Watchdog) -> None:
        """Does this process's part of the share; raises Stopped when a signal has come."""

    def work(self, signals: SignalWatch) -> int:
        with Watchdog(self.target.folder / faults.HANG, "" if self.retries else self.advice) as watchdog:
            try:
                self.do(signals, watchdog)
            except Stopped:
                raise
            except Exception as error:
                self._record(process_rank(), failure_of(error, watchdog.doing))
                return 1
        return 0

    def failed(self, rank: int, trace: str) -> None:
        self._record(rank, Failure(trace, outside=False, for_good=True))

    def _record(self, rank: int, failure: Failure) -> None:
        """Prints and records a failure, unless another process of this share has failed before."""
        facts = {"traceback": failure.trace, "outside": failure.outside, "node": process_node()}
        for_good = failure.for_good or self.retries == 0
        if faults.write_failure(self._failure, failed_rank=rank, for_good=for_good, **facts):
            print(failure.trace, file=sys.stderr, flush=True)

    @property
    def _failure(self) -> Path:
        return self.target.folder / f".failure-{self.name}.json"

    def is_done(self, cause: str | None) -> bool:
        return False  # it is tried again, and ends at once if nothing is left

    def try_again_after(
        self,
        cause: str | None,
        node: str | None,
        come_back: Callable[[Sequence[str]], str | None] | None,
        own: str | None = None,
    ) -> bool:
        fault = faults.patiently(
            lambda: faults.judge_share(self._failure, self.left, self.retries, cause, node, own),
            long=come_back is not None,
        )
        then = "The job is tried again." if fault.again else self.advice
        # What a process has printed itself before it failed is not said twice.
        said = f"{fault.cause}. " if fault.again or fault.traceback is None else ""
        print(f"{said}{then}", file=sys.stderr, flush=True)
        if not fault.again or come_back is None:
            return fault.again
        job_id = come_back(fault.left_out)
        if job_id is not None:
            self.comes_back_as(job_id)
        return job_id is not None


S = TypeVar("S", bound=Share)


def not_given_up(shares: Sequence[S]) -> list[S]:
    """Returns the shares that may be tried once more: those that were not given up."""
    return [share for share in shares if not faults.is_given_up(share.target.folder, share.left)]
