"""The command `evaluate`: measures samples, here or on Slurm, and prints the results."""

import contextlib
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from commands.arguments import AMONG_OPTIONS, optional
from commands.where import Data, Launch, show
from diffusion.errors import UserError
from jobs.evaluate import plan, report
from jobs.evaluate.job import EvaluateJob, EvaluateMergeJob
from jobs.evaluate.plan import Evaluation
from jobs.runtime.job import submitted
from jobs.runtime.surroundings import decorate
from jobs.storage import faults, ownership, run_folder
from jobs.storage.checkpoints import Named
from jobs.storage.run_folder import RunFolder
from slurm import queue
from slurm.place import ROUNDS, Here, OnSlurm

Samples = Annotated[
    Positional[str],
    arg(
        metavar="RUN",
        help="A run folder, EXPERIMENT/NAME, EXPERIMENT for its last created run, or one of its sets of "
        "samples, as in RUN/samples/NAME.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measures samples of a run against the exact answer or real data; with a second run, compares the two.

    Every number is shown with its 95% interval and with its floor: what a perfect model would have. Run again, it
    computes what is missing.
    """

    run: Samples
    other: Annotated[
        Positional[str | None],
        arg(metavar="[RUN2]", help="Another one, to be compared with the first.", help_behavior_hint="(default: none)"),
    ] = None
    samples: Annotated[str | None, optional("NAME", "the newest complete set")] = None
    """Name of the set of samples, in both runs."""
    checkpoint: Annotated[Named | None, optional("{STEP,best}", "of any")] = None
    """Take the newest complete set of this checkpoint; best is the one with the lowest held-out loss."""
    all: bool = False
    """All sets drawn with the newest one's weights: quality against network evaluations, as a table and a figure."""
    inception_fid: bool = False
    """Also compute Inception FID (images only; its weights file must be on this machine)."""
    likelihood: bool = False
    """Also compute the likelihood along the probability-flow ODE (images only, minutes on a CPU; 1d always has it)."""
    json: bool = False
    """Print JSON, for scripts."""
    data: Data = field(default_factory=Data)
    where: Annotated[Launch, AMONG_OPTIONS] = field(default_factory=Launch)

    def __call__(self) -> int:
        if self.all and (self.other is not None or self.samples is not None):
            raise UserError("--all takes one RUN and no --samples")
        if self.checkpoint is not None and self.samples is not None:
            raise UserError("--checkpoint and --samples both choose the set; give one of them")
        asked = self._asked()
        experiments = {found.protocol["experiment"] for found in asked}
        if len(experiments) > 1:
            raise UserError(f"only runs of one experiment can be compared; got {' and '.join(sorted(experiments))}")
        if self.where.dry_run:
            for found in asked:
                show(dict(found.protocol), self._describe(found))
            return 0
        with contextlib.redirect_stdout(sys.stderr):  # what is printed for scripts is JSON alone
            codes = [self._evaluate(found) for found in asked if not found.is_done()]
        if any(codes):
            return max(codes)
        if all(found.is_complete() for found in asked):
            self._show(asked)
            return 0
        # Without --wait the results come later, so that they are missing now is no failure.
        return 1 if self.where.wait else 0

    def _asked(self) -> list[Evaluation]:
        """The evaluations that the user means; raises UserError where there are none."""
        found = [self._find(name) for name in (self.run, self.other) if name is not None]
        asked = self._all(found[0][0]) if self.all else [self._plan(run, name or self.samples) for run, name in found]
        return [replace(evaluation, data_root=self.data.root) for evaluation in asked]

    def _plan(self, run: RunFolder, name: str | None) -> Evaluation:
        return plan.plan(run, name, self.inception_fid, self.likelihood, self.checkpoint)

    def _all(self, run: RunFolder) -> list[Evaluation]:
        """Finds the sets to compare with the newest one: of the same weights and classes, with enough samples."""
        found = [self._plan(run, None)]
        for name in plan.complete_sets(run)[1:]:
            try:
                other = self._plan(run, name)
            except UserError as error:
                print(f"Left out: {error}", file=sys.stderr)
                continue
            if other.protocol["sha256"]["weights"] != found[0].protocol["sha256"]["weights"]:
                print(f"Left out: {other.folder.name}, which is of other weights", file=sys.stderr)
            elif len({frozenset(each.samples.settings.classes or ()) for each in (other, found[0])}) > 1:
                # What it is compared with is another distribution, and some metrics are not there.
                print(f"Left out: {other.folder.name}, which is of other classes", file=sys.stderr)
            else:
                found.append(other)
        return found

    def _find(self, name: str) -> tuple[RunFolder, str | None]:
        """Finds a run, and the name of the set if the user has given the set's folder."""
        for folder in (Path(name), self.where.runs_dir / name):
            if folder.parent.name == "samples" and (run := RunFolder(folder.parent.parent)).exists():
                return run, folder.name
        return run_folder.find(name, self.where.runs_dir), None

    def _jobs(self, asked: Evaluation) -> tuple[Here | OnSlurm, EvaluateJob, list[EvaluateJob]]:
        """Returns where to evaluate, the job for this machine, and the elements of an array for Slurm."""
        place, processes = self.where.place(RunFolder(asked.samples.run)), self.where.processes
        retries = self.where.retries_at(place)
        job = EvaluateJob(asked, (0, processes), self.where.resolve_device(place), merge=True, retries=retries)
        if isinstance(place, OnSlurm):
            place, processes = replace(place, processes=1), place.elements(processes)
        return place, job, [replace(job, share=(i, processes), merge=False) for i in range(processes)]

    def _describe(self, asked: Evaluation) -> str:
        place, job, elements = self._jobs(asked)
        if isinstance(place, OnSlurm):
            return place.describe_array(elements, len(elements), EvaluateMergeJob(asked))
        return place.describe(job)

    def _evaluate(self, asked: Evaluation) -> int:
        """Evaluates one set, here or on Slurm; returns the exit code."""
        run = RunFolder(asked.samples.run)
        place, job, elements = self._jobs(asked)
        for job_id, state in queue.active(asked.job_ids()).items():
            raise UserError(f"{asked.folder} is being evaluated already: job {job_id} is {state}")
        merge = EvaluateMergeJob(asked)
        if isinstance(place, OnSlurm):
            place.check_array(elements, merge)
        asked.config().data.prepare(print)
        print(f"Evaluating {report.title(asked)}", flush=True)
        faults.forgive_set(asked.folder)
        if isinstance(place, Here):
            with ownership.sampling(run.path) as descriptor:
                return place.run(job, keep_open=[descriptor])
        self.where.copy_code(place)
        place.run_array(elements, submitted, len(elements), merge, min(ROUNDS, job.retries))
        if self.where.wait:
            # The ids are asked for again and again, because the last job submits more if elements were lost.
            place.wait(asked.job_ids, lambda: False if asked.is_done() else None)
        return 0

    def _show(self, asked: list[Evaluation]) -> None:
        """Prints one evaluation, or what several say together."""
        width = shutil.get_terminal_size().columns
        results = [found.read() for found in asked]
        value: object
        if self.all:
            figure = RunFolder(asked[0].samples.run).figures / "quality.png"
            with contextlib.redirect_stdout(sys.stderr):
                decorate(figure.name, lambda: report.draw_quality(asked, figure), print)
            value, text = report.quality_rows(asked), report.quality(asked, width)
        elif len(asked) == 2:
            a, b = asked
            value = {"a": results[0], "b": results[1], "differences": report.differences(a, b)}
            text = report.two(a, b, width)
        else:
            value, text = results[0], report.one(asked[0], width)
        print(json.dumps(value, indent=2) if self.json else text)
