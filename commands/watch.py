"""The commands `status`, `logs`, `cancel` and `sync`, which look at runs from outside."""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

from tyro.conf import Positional, arg

from commands.arguments import Run, RunsDir
from diffusion.errors import UserError
from jobs.storage import run_folder
from jobs.storage.run_folder import RunFolder
from jobs.watch import detail, listing, logs, states, sweep, sync
from jobs.watch.cancel import cancel
from slurm import queue
from slurm.errors import SlurmError
from slurm.profile import load as load_profile


@dataclass(frozen=True, kw_only=True)
class Status:
    """Shows all runs, one of them in detail, or a sweep's runs by their loss."""

    # Optional, because tyro imports typeguard to understand `str | None`, which takes longer than all the rest.
    run: Annotated[
        Positional[Optional[str]],  # noqa: UP045
        arg(
            metavar="[RUN]",
            help="A run folder, EXPERIMENT/NAME, EXPERIMENT for its last created run, or a sweep.",
            help_behavior_hint="(default: all runs)",
        ),
    ] = None
    runs_dir: RunsDir = Path("runs")
    json: bool = False
    """Print JSON, for scripts."""
    watch: bool = False
    """Draw it again and again, until Ctrl-C; where the output is no terminal, until no run lives."""

    def __call__(self) -> int:
        if self.watch:
            return self._watch()
        width = shutil.get_terminal_size().columns
        if points := self._sweep():
            entries = sweep.by_loss(points, ask_slurm(states.newest_jobs(points)))
            print(json.dumps(entries, indent=2) if self.json else sweep.render(entries, width))
            return 0
        if self.run is not None:
            run = run_folder.find(self.run, self.runs_dir)
            shown = detail.describe(run, ask_slurm(detail.all_jobs(run)))
            print(json.dumps(shown, indent=2) if self.json else detail.render(shown, width))
            return 0
        if self.runs_dir.exists() and not self.runs_dir.is_dir():
            raise UserError(f"--runs-dir must be a folder; {self.runs_dir} is none")
        runs = listing.runs(self.runs_dir)
        jobs = ask_slurm(states.newest_jobs(runs))
        found = listing.by_last_update(states.summarize(run, jobs) for run in runs)
        if self.json:
            print(json.dumps([asdict(entry) for entry in found], indent=2))
        else:
            print(listing.render(found, width) if found else f"There are no runs in {self.runs_dir}.")
        return 0

    def _watch(self) -> int:
        """Shows all runs, those of a sweep, or one of them, until the user has seen enough."""
        from jobs.watch import screen  # here, because only --watch needs it

        if self.json:
            raise UserError("--watch is for people, --json for scripts; give one of them")
        self._found()  # which says now that there is no such run
        screen.watch(self._found, ask_slurm, queue.Pace(load_profile(None, {}).poll_s).is_due)
        return 0

    def _sweep(self) -> list[RunFolder]:
        """The runs of the sweep that the user means, [] if it is none; an existing folder is a run."""
        return [] if self.run is None else sweep.runs_of(self.run, self.runs_dir)

    def _found(self) -> list[RunFolder]:
        """The runs that are watched now."""
        if self.run is None:
            return listing.runs(self.runs_dir)
        return sweep.named(self.run, self.runs_dir)


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Shows what a run has printed."""

    run: Run
    follow: bool = False
    """Go on until the run has ended."""
    runs_dir: RunsDir = Path("runs")

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.runs_dir)
        if not self.follow:
            _say_aside(logs.title(run))
            print(logs.read(run), end="")
            return 0

        pace = queue.Pace(load_profile(None, {}).poll_s)
        jobs: dict[str, queue.JobState] | None = None

        def is_alive() -> bool:
            # Of a finished run, too: its last words reach the file when srun ends, after status.json has changed.
            nonlocal jobs
            job_id, lives = states.newest_job(states.read_launch(run)), states.lives(run)
            if job_id is not None and pace.is_due(lives, job_id):
                jobs = ask_slurm([job_id])
            return (job_id is not None and lives is True) or states.is_alive(run, jobs)

        for text in logs.follow(run, is_alive, _say_aside):
            print(text, end="", flush=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Ends a run, with a last checkpoint; `resume` continues it."""

    run: Run
    runs_dir: RunsDir = Path("runs")

    def __call__(self) -> int:
        cancel(run_folder.find(self.run, self.runs_dir), queue.active, queue.cancel, queue.Pace().is_due, print)
        return 0


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Sends what was tracked offline to wandb, from a machine with a network; knows what it has sent."""

    runs: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="RUN [RUN ...]",
            help="Each a run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run.",
            help_behavior_hint="(required)",
        ),
    ]
    live: bool = False
    """Go on until the runs have ended."""
    runs_dir: RunsDir = Path("runs")

    def __call__(self) -> int:
        if not self.runs:
            raise UserError("sync needs a RUN: a run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run")
        runs = []
        for run in (run_folder.find(name, self.runs_dir) for name in self.runs):
            if left := sync.others(run):
                print(
                    f"{run}: tracking under another id is left out: in a run that this is a copy of, or before "
                    f"launch.json was lost. `wandb sync FOLDER` sends such a folder: "
                    f"{', '.join(str(segment.parent) for segment in left)}."
                )
            if sync.segments(run) or _is_alive(run):  # which may still begin one
                runs.append(run)
            else:
                print(f"{run}: there is nothing to send: it was {sync.why_nothing(run)}.")
        if not runs:
            return 0
        sync.check_server()
        if self.live:
            sync.sync_live(runs, _is_alive, print)
        for run in runs:
            sync.sync(run, _is_alive(run), print)
            found = sync.segments(run)
            unsent = sum(not sync.is_sent(segment) for segment in found)
            later = "; the last one is being written, --live sends it." if unsent else "."
            print(f"{run}: wandb has {len(found) - unsent} of {len(found)} segments{later}")
        return 0


def _is_alive(run: RunFolder) -> bool:
    """Whether the run waits, runs or is coming to an end somewhere."""
    job_id = states.newest_job(states.read_launch(run))
    return states.is_alive(run, None if job_id is None else ask_slurm([job_id]))


def ask_slurm(job_ids: list[str]) -> dict[str, queue.JobState] | None:
    """Asks Slurm about the jobs; warns and returns None if it does not answer."""
    try:
        return queue.look(job_ids)
    except SlurmError as error:
        _say_aside(f"warning: {error}")
        return None


def _say_aside(text: str) -> None:
    """Prints to stderr, so that people see it and a pipe does not."""
    print(text, file=sys.stderr, flush=True)
