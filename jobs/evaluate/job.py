"""Evaluating samples as a job, for the place where it runs. Importable without torch, picklable."""

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.errors import UserError
from jobs.evaluate.plan import Evaluation
from jobs.files import write_json
from jobs.followers.start import follow_evaluation
from jobs.health.watchdog import END, Watchdog
from jobs.runtime.job import IndependentJob, JobError, process_rank
from jobs.runtime.signals import SignalWatch
from jobs.sample.share import Share, not_given_up
from jobs.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind


@dataclass(frozen=True)
class EvaluateJob(Share):
    """Computes a share of an evaluation's units; if asked to, the process that finishes last merges them."""

    target: Evaluation
    share: tuple[int, int]
    """(i, n): the first process takes every n-th unit from the i-th on, the others follow it."""
    device: "Kind"
    merge: bool
    """Whether the last process to finish merges the results; if not, submit an `EvaluateMergeJob`."""
    retries: int = 0
    advice: ClassVar[str] = "The same command computes what is missing."

    @property
    def name(self) -> str:
        return f"evaluation-{self.share[0]}"

    @property
    def left(self) -> str:
        try:
            results = json.loads(self._results.read_text())
        except FileNotFoundError:  # the share has ended before it had listed its units
            results = []
        done = sum(Path(result).exists() for result in results)
        return f"share {self.share[0]} of {self.share[1]} with {done} units done"

    @property
    def _results(self) -> Path:
        """Returns where the results of this share's units are listed: who judges a fault knows no units."""
        return self.target.kept / f"{self.name}.json"

    def around(self) -> AbstractContextManager[Any]:
        return redirect_stdout(sys.stderr)  # what is printed for scripts is JSON alone, after the job

    def do(self, signals: SignalWatch, watchdog: Watchdog) -> None:
        from jobs.evaluate.units import evaluate, merge, missing, open_evaluator

        first, step = self.share
        evaluator = open_evaluator(self.target, self.device)
        if process_rank() == 0:
            units = list(evaluator.units().items())
            # A job that merges is alone, and its processes have all units; in an array each element has a share.
            mine = units if self.merge else units[first::step]
            self.target.kept.mkdir(exist_ok=True)
            write_json(self._results, [str(self.target.result_path(name, unit.of)) for name, unit in mine])
        evaluate(self.target, evaluator, (first + process_rank(), step), signals, watchdog)
        # Two processes that end together merge twice, into the same bytes.
        if self.merge and not missing(self.target, evaluator) and not self.target.is_done():
            watchdog.phase("merging", END)
            merge(self.target, evaluator)
            follow_evaluation(RunFolder(self.target.samples.run), self.target.samples.name, print)


@dataclass(frozen=True)
class EvaluateMergeJob(IndependentJob):
    """Merges an evaluation after its array has ended, well or badly; if units are missing, says which."""

    target: Evaluation

    def work(self, signals: SignalWatch) -> int:
        from jobs.evaluate.units import merge, missing, open_evaluator

        evaluator = open_evaluator(self.target, "cpu")
        lacking = missing(self.target, evaluator)
        if lacking:
            print(f"{len(lacking)} units are missing ({', '.join(lacking)}).", flush=True)
            return 1
        if not self.target.is_done():
            merge(self.target, evaluator)
            follow_evaluation(RunFolder(self.target.samples.run), self.target.samples.name, print)
        return 0

    def lost(self, jobs: Sequence[EvaluateJob]) -> list[EvaluateJob]:
        """Returns those of the jobs that have left a unit of their share undone, unless they were given up."""
        from jobs.evaluate.units import missing, open_evaluator

        try:
            evaluator = open_evaluator(self.target, "cpu")
        except (UserError, JobError):  # `work` has said so
            return []
        units, lacking = list(evaluator.units()), set(missing(self.target, evaluator))
        return not_given_up([job for job in jobs if lacking & set(units[job.share[0] :: job.share[1]])])
