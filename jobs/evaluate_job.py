"""Evaluating samples as a job, for the place where it runs. Importable without torch, picklable."""

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.evaluation import Evaluation
from jobs.job import Requeue, process_rank, stopped
from jobs.run_folder import RunFolder
from jobs.stop import SignalWatch
from jobs.tracking import follow_evaluation

if TYPE_CHECKING:
    from jobs.world import Kind


@dataclass(frozen=True)
class EvaluateJob:
    """Computes a share of an evaluation's units; the process that finishes last merges them, if asked to."""

    evaluation: Evaluation
    share: tuple[int, int]
    """(i, n): the first process takes every n-th unit from the i-th on, the others follow it."""
    device: "Kind"
    merge: bool
    """Otherwise an `EvaluateMergeJob` does it."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        # What is printed for scripts is JSON alone, after the job.
        with SignalWatch() as signals, contextlib.redirect_stdout(sys.stderr):
            try:
                from jobs.evaluate import evaluate, merge, missing, open_evaluator
                from jobs.sample import Stopped

                first, step = self.share
                evaluator = open_evaluator(self.evaluation, self.device)
                try:
                    evaluate(self.evaluation, evaluator, (first + process_rank(), step), signals)
                except Stopped:
                    return stopped(signals.requested, requeue)
                # Two processes that end together merge twice, into the same bytes.
                if self.merge and not missing(self.evaluation, evaluator) and not self.evaluation.is_complete():
                    merge(self.evaluation, evaluator)
                    follow_evaluation(self.evaluation, print)
                return 0
            except Exception:
                self.failed(process_rank(), traceback.format_exc())
        return 1

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        return _submitted(self.evaluation, submit)


@dataclass(frozen=True)
class EvaluateMergeJob:
    """Merges an evaluation after its array has ended, however it has; says what is missing if it must."""

    evaluation: Evaluation

    def __call__(self, requeue: Requeue | None = None) -> int:
        from jobs.evaluate import merge, missing, open_evaluator

        evaluator = open_evaluator(self.evaluation, "cpu")
        lacking = missing(self.evaluation, evaluator)
        if lacking:
            print(f"{len(lacking)} units are missing ({', '.join(lacking)}): run the same `evaluate` command again.")
            return 1
        if not self.evaluation.is_complete():
            merge(self.evaluation, evaluator)
            follow_evaluation(self.evaluation, print)
        return 0

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)

    def submitted(self, submit: Callable[[], str]) -> str:
        return _submitted(self.evaluation, submit)


def _submitted(evaluation: Evaluation, submit: Callable[[], str]) -> str:
    """Records the job with the run, for `cancel`, and with the evaluation, so that it is not done twice at once."""
    job_id = submit()
    run = RunFolder(evaluation.samples.run)
    run.update_launch(evaluate_job_ids=[*run.read_launch().get("evaluate_job_ids", []), job_id])
    evaluation.add_job(job_id)
    return job_id
