"""Follows a training from outside: `python -m jobs.followers.training RUN TOKEN MACHINE`.

It reads what the training writes, feeds wandb, and keeps figures/training.png up to date. RUN/.tracking.json says which
lines wandb has on its disk for certain. A killed follower loses the later ones, and the next one sends them again.

On each further node of the job another one runs, which adds how busy that node is.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from jobs.files import write_atomically, write_json
from jobs.followers.alerts import Alerts
from jobs.followers.curves import Curves, account_row, quality_row, timing_row
from jobs.followers.loop import Followed, follow, say
from jobs.followers.sample_pictures import Sketches
from jobs.followers.start import online_mark
from jobs.storage import account, checkpoints, faults
from jobs.storage.ownership import Ownership
from jobs.storage.records import Tail, last_start, now
from jobs.storage.run_folder import RunFolder, State
from jobs.tracking.dashboard import FLUSH_S, Dashboard, Wandb, open_dashboard
from jobs.tracking.identity import POSITION, Machine, of_training
from jobs.tracking.stop_button import StopButton

DRAW_S = 60.0
"""Seconds between two pictures of the curves."""
FAILURE_S = 3.0
"""Seconds after which a process that has failed has certainly written why."""
SAFE_S = FLUSH_S + 2
"""After so many seconds, what wandb was given is certainly on the disk."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the files are read: a step of metrics.jsonl, a number of lines of timing.jsonl, bytes of log.txt,
    a step of quality.jsonl."""

    step: int = 0
    timing: int = 0
    log: int = 0
    quality: int = 0


class TrainingFollower:
    """Passes on what a training writes.

    Three numbers say how far it is: `_position` is what wandb was given, `_recent` remembers when, so that what was
    given `SAFE_S` ago can be written down as certain, and `_kept` is the newest checkpoint that was uploaded.
    """

    def __init__(self, run: RunFolder, owner: Ownership, machine: Machine, attempt: int) -> None:
        self._run, self._owner = run, owner
        self._experiment, self._config = run.read_experiment()
        start = last_start(run)
        self._position_file = run.path / POSITION
        self._position = self._read_position()
        if attempt == 1:
            # A new start makes the lines after its checkpoint again, so they are sent again. A second attempt within
            # one start goes on where the first one was.
            step, quality = (min(at, start["step"]) for at in (self._position.step, self._position.quality))
            self._position = dataclasses.replace(self._position, step=step, quality=quality)
        self._recent = deque([(time.monotonic(), self._position)])
        self._metrics, self._times, self._judged = Tail(run.metrics), Tail(run.timing), Tail(run.quality)
        self._timing: list[dict[str, Any]] = []
        self._history: list[dict[str, Any]] = []
        self._quality: list[dict[str, Any]] = []
        self._curves = Curves(self._config.diffusion.timesteps, start.get("loss_floor"))
        self._sketches = Sketches(run, self._config.tracking.samples_every)
        self._drawn = time.monotonic() - DRAW_S / 2
        self._booked = time.monotonic()
        self._kept = start["step"]
        self.stop_button = StopButton(run, say)
        # It may be of an earlier start; this one may turn out to be offline.
        online_mark(run).unlink(missing_ok=True)
        identity, mode = of_training(run, start, machine), self._config.tracking.mode
        self._dashboard = open_dashboard(identity, mode, say, self.stop_button.press)
        self.stop_button.opened()
        self._alerts = Alerts(run, self._config, self._dashboard, start["step"])
        if self._dashboard.is_online:
            write_atomically(online_mark(run), owner.token)

    def look(self) -> None:
        """Passes on what is new; raises whatever wandb raises."""
        for line in self._metrics.read():
            self._history.append(line)
            row = self._curves.row(line)
            if line["step"] > self._position.step:
                if line["skipped"]:
                    self._alerts.skipped(line["step"])
                self._dashboard.log(line["step"], row)
                self._position = dataclasses.replace(self._position, step=line["step"])
        for line in self._times.read():
            self._timing.append(line)
            requeues = sum(past["event"] == State.REQUEUED for past in self._timing)
            row = timing_row(line, requeues)
            if len(self._timing) > self._position.timing:
                if row:
                    self._dashboard.log(line["step"], row)
                self._position = dataclasses.replace(self._position, timing=len(self._timing))
        if judged := self._judged.read():
            self._quality += judged
            for line in judged:
                if line["step"] > self._position.quality:
                    self._dashboard.log(line["step"], quality_row(line))
            newest = max(self._position.quality, judged[-1]["step"])
            self._position = dataclasses.replace(self._position, quality=newest)
        if self._dashboard.is_shown:
            self._pass_log()
            self._alerts.watch_progress()
            self._show_checkpoints()
            self._remember()
            self._show_time(DRAW_S)
        self.draw(DRAW_S)

    def draw(self, least_s: float) -> None:
        """Draws the curves if they were last drawn at least `least_s` ago."""
        if time.monotonic() - self._drawn < least_s or not self._history:
            return
        with contextlib.suppress(Exception):  # a picture that cannot be drawn must not end the tracking
            from diffusion.figures import training  # here, because plotting libraries take a second to import

            self._owner.check()
            path = self._run.figures / ".training.png"
            training.training(self._history, self._timing, path, self._quality)
            # Again, because drawing takes a while in which another job may have taken the run over.
            self._owner.check()
            path.replace(self._run.figures / "training.png")
        self._drawn = time.monotonic()

    def end(self) -> None:
        """Sends the rest after the training has ended, and its results if it has reached its last step."""
        self.look()
        self._show_time(0)
        self._sketches.close()
        state, step = self._timing[-1]["event"], self._timing[-1].get("step", 0)
        if state not in list(State):
            if self._dashboard.is_shown:
                self._pass_traceback()
            if faults.is_trained(self._run):  # as whoever has started the job says of it, perhaps later
                state, step = State.FINISHED, self._config.train.steps
        if state == State.FINISHED:
            self._alerts.finished(step, self._history[-1]["loss"] if self._history else None)
            pictures = sorted(self._run.figures.glob("[!.]*.png"))
            self._dashboard.show(step, {f"results/{path.stem}": path for path in pictures})
            final = self._run.checkpoints / checkpoints.folder_name(step) / checkpoints.EMA
            samples = self._run.path.glob("samples/*/manifest.json")
            files = [final, self._run.path / "experiment.json", *pictures, *sorted(samples)]
            self._keep("model", files, in_place=True)
        elif state in (State.REQUEUED, State.INTERRUPTED, State.CANCELLED):
            # A finished training has drawn this picture itself.
            self.draw(0)
        ended_well = state in (State.FINISHED, State.INTERRUPTED, State.CANCELLED)
        self._dashboard.finish(0 if ended_well else 1, preempted=state == State.REQUEUED)
        if self._dashboard.is_shown:
            self._write_position(self._position)

    def _show_checkpoints(self) -> None:
        newest = next(iter(checkpoints.steps(self._run.checkpoints)), 0)
        if (done := self._sketches.finished()) is not None and done[1]:
            self._dashboard.show(*done)
        self._sketches.start(newest)
        if self._config.tracking.checkpoints and newest > self._kept:
            self._kept = newest
            folder = self._run.checkpoints / checkpoints.folder_name(newest)
            # Not in place: the training may delete this checkpoint before wandb has sent it.
            self._keep("checkpoint", sorted(folder.iterdir()), in_place=False)

    def _pass_log(self) -> None:
        """Passes on the whole lines that the job has printed since the last time."""
        done = self._position.log
        with contextlib.suppress(FileNotFoundError), self._run.log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < done:  # somebody has emptied it
                done = 0
            file.seek(done)
            lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            if lines:
                self._dashboard.write(lines.decode(errors="replace"))
                self._position = dataclasses.replace(self._position, log=done + len(lines))

    def _pass_traceback(self) -> None:
        """Passes on why the job has failed: that is printed, but not into log.txt."""
        deadline = time.monotonic() + FAILURE_S
        while not (failure := self._run.read_failure()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if failure:
            self._dashboard.write(failure["traceback"])

    def _show_time(self, least_s: float) -> None:
        """Shows how the run's time was spent, if that was last done at least `least_s` ago."""
        if time.monotonic() - self._booked >= least_s:
            self._booked = time.monotonic()
            spent = account.of_run(self._run, self._run.read_launch(), self._run.read_status(), now())
            self._dashboard.log(spent.useful_steps, account_row(spent))

    def _keep(self, kind: str, files: list[Path], *, in_place: bool) -> None:
        name = f"{self._experiment}-{self._run.path.name}-{kind}"
        self._dashboard.keep(name, kind, files, self._run.path, in_place=in_place)

    def _remember(self) -> None:
        """Writes down which lines are on wandb's disk for certain."""
        self._recent.append((time.monotonic(), self._position))
        safe = None
        while time.monotonic() - self._recent[0][0] >= SAFE_S:
            safe = self._recent.popleft()[1]
        if safe is not None:
            self._write_position(safe)

    def _write_position(self, position: Position) -> None:
        if position != self._read_position():
            with contextlib.suppress(OSError):
                write_json(self._position_file, dataclasses.asdict(position))

    def _read_position(self) -> Position:
        try:
            return Position(**json.loads(self._position_file.read_text()))
        except (OSError, ValueError, TypeError):
            return Position()


class NodeFollower:
    """Adds to a run that is tracked online how busy this node is, which is not the first of the job."""

    def __init__(self, run: RunFolder, token: str, machine: Machine) -> None:
        self._run, self._token, self._machine = run, token, machine
        self._dashboard: Dashboard | None = None

    def look(self) -> None:
        """Begins as soon as the first node is online."""
        online = online_mark(self._run)
        if self._dashboard is None and online.exists() and online.read_text() == self._token:
            identity = of_training(self._run, last_start(self._run), self._machine)
            self._dashboard = Wandb(identity, "shared", say, stop=lambda: None)

    def end(self) -> None:
        """Ends this node's part; the first node ends the run."""
        if self._dashboard is not None:
            self._dashboard.finish(0, preempted=False)


def main() -> None:
    run, owner = RunFolder(Path(sys.argv[1])), Ownership(Path(sys.argv[1]), sys.argv[2])
    machine = Machine(**json.loads(sys.argv[3]))

    def start(attempt: int) -> Followed:
        return (
            TrainingFollower(run, owner, machine, attempt)
            if machine.is_first
            else NodeFollower(run, owner.token, machine)
        )

    follow(start)


if __name__ == "__main__":
    main()
