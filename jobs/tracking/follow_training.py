"""Follows a training from outside: `python -m jobs.tracking.follow_training RUN TOKEN MACHINE`.

It reads what the training writes, feeds wandb, and keeps figures/training.png up to date. RUN/.tracking.json says which
lines wandb has on its disk for certain. A killed follower loses the later ones, and the next one sends them again.

On each further node of the job another one runs, which adds how busy that node is.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

from jobs.files import write_atomically, write_json
from jobs.storage import account, checkpoints
from jobs.storage.account import Account
from jobs.storage.ownership import Ownership
from jobs.storage.provenance import ROOT
from jobs.storage.records import Tail, last_start, now, read_jsonl
from jobs.storage.run_folder import RunFolder, State
from jobs.tracking.dashboard import ALERT_S, FLUSH_S, Dashboard, Wandb, open_dashboard
from jobs.tracking.identity import Machine, of_training
from jobs.tracking.loop import Followed, follow, say
from jobs.tracking.start import online_mark

DRAW_S = 60.0
"""Seconds between two pictures of the curves."""
STUCK_S = 600.0
"""A training that does no step for so many seconds makes no progress."""
FAILURE_S = 3.0
"""A process that fails has written why after so many seconds."""
OLD_STOP_S = 25.0
"""So soon after a start, Stop may have been pressed before it: wandb asks when it starts and 15 s later."""
SAFE_S = FLUSH_S + 2
"""After so many seconds, what wandb was given is certainly on the disk."""


class Curves:
    """Turns lines of metrics.jsonl into what the dashboard shows.

    wandb makes a section of each first part of a name, in the order of the alphabet. People look at `generated`,
    `loss`, `loss_by_timestep`, `optimizer`, `quality`, `results`, `run`, `speed` and `time` in this order.
    """

    def __init__(self, timesteps: int, loss_floor: float | None) -> None:
        self._timesteps, self._floor = timesteps, loss_floor
        self._skipped = 0
        self._clipped: deque[int] = deque(maxlen=20)

    def row(self, line: dict[str, Any]) -> dict[str, Any]:
        """Returns what the dashboard shows of a line; call it with every line in turn, because it keeps sums."""
        loss, floor = line["loss"], self._floor
        self._skipped += line["skipped"]
        self._clipped.append(line["clipped"])
        bands = sorted(name for name in line if name.startswith("loss_t"))
        edges = [round(i * self._timesteps / len(bands)) for i in range(len(bands) + 1)]
        names = [f"loss_by_timestep/{low:04d}-{high - 1:04d}" for low, high in pairwise(edges)]
        return {
            "loss/train": loss,
            "loss/held_out": line.get("held_out_loss"),
            "loss/floor": floor,
            "loss/excess": None if loss is None or floor is None else loss - floor,
            "optimizer/learning_rate": line["lr"],
            "optimizer/ema_decay": line["ema_decay"],
            "optimizer/gradient_norm": line["grad_norm"],
            "optimizer/clipped_share": sum(self._clipped) / len(self._clipped),
            "optimizer/skipped_steps": self._skipped,
            **{name: line[band] for name, band in zip(names, bands, strict=True)},
        }


def timing_row(line: dict[str, Any], requeues: int) -> dict[str, Any]:
    """Returns what the dashboard shows of a line of timing.jsonl."""
    if line["event"] == "progress":
        seconds = ("step", "data", "compute", "communication", "checkpoint")
        return {
            "speed/images_per_s": line["images_per_s"],
            **{f"speed/{part}_s": line[f"{part}_s"] for part in seconds},
            "speed/memory_mb": line["memory_mb"],
        }
    if line["event"] == "start":
        return {"run/restarts": line["restarts"], "run/processes": line.get("processes")}
    return {"run/requeues": requeues} if line["event"] == State.REQUEUED else {}


def quality_row(line: dict[str, Any]) -> dict[str, Any]:
    """Returns what the dashboard shows of a line of quality.jsonl."""
    return {
        f"quality/{name}" + (f"_{key}" if key != "value" else ""): metric[key]
        for name, metric in line["metrics"].items()
        for key in ("value", "low", "high", "floor")
    }


def account_row(spent: Account) -> dict[str, Any]:
    """Returns what the dashboard shows of how a run's time was spent."""
    seconds = {f"time/{part}_s": round(value, 3) for part, value in spent.seconds.items()}
    useful = {"time/useful_share": spent.seconds["useful"] / spent.whole_s} if spent.whole_s else {}
    return {**seconds, **useful, "time/redone_steps": spent.redone_steps}


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the files are read: a step of metrics.jsonl, a number of lines of timing.jsonl, bytes of log.txt,
    a step of quality.jsonl."""

    step: int = 0
    timing: int = 0
    log: int = 0
    quality: int = 0


class Sketches:
    """Draws pictures of samples from checkpoints in a process of its own, which works at most 5% of the time."""

    def __init__(self, run: RunFolder, every: int) -> None:
        self._run, self._every = run, every
        self._process: subprocess.Popen[bytes] | None = None
        self._folder, self._step = Path(), 0
        self._started = self._next = 0.0

    def finished(self) -> tuple[int, dict[str, Path]] | None:
        """Returns the step and the pictures of a process that has ended since the last call, None if none has."""
        if self._process is None or self._process.poll() is None:
            return None
        self._process = None
        # After t seconds of drawing it rests for 20 t: at most 5% of the time goes to pictures.
        self._next = time.monotonic() + 20 * (time.monotonic() - self._started)
        return self._step, {f"generated/{path.stem}": path for path in sorted(self._folder.glob("*.png"))}

    def start(self, newest: int) -> None:
        """Draws the newest checkpoint if it is time for one."""
        due = self._step // self._every < newest // self._every if self._every else False
        if not due or self._process is not None or time.monotonic() < self._next:
            return
        self._clear()
        self._folder, self._step = Path(tempfile.mkdtemp(prefix="sketch-")), newest
        self._started = time.monotonic()
        program = [sys.executable, "-m", "jobs.tracking.sample_pictures"]
        command = [*program, str(self._run.path), str(newest), str(self._folder)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._clear()

    def _clear(self) -> None:
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)


class TrainingFollower:
    """Passes on what a training writes.

    Three numbers say how far it is: `_position` is what wandb was given, `_recent` remembers when, so that what was
    given `SAFE_S` ago can be written down as certain, and `_kept` is the newest checkpoint that was uploaded.
    """

    def __init__(self, run: RunFolder, owner: Ownership, machine: Machine, attempt: int) -> None:
        self._run, self._owner = run, owner
        self._experiment, self._config = run.read_experiment()
        self._timing = read_jsonl(run.timing)
        start = next(line for line in reversed(self._timing) if line["event"] == "start")
        self._position_file = run.path / ".tracking.json"
        position = self._read_position()
        # A new start makes the lines after its checkpoint again, so they are sent again. A second attempt within one
        # start goes on where the first one was.
        self._position = (
            position
            if attempt > 1
            else dataclasses.replace(
                position, step=min(position.step, start["step"]), quality=min(position.quality, start["step"])
            )
        )
        self._recent = deque([(time.monotonic(), self._position)])
        self._metrics, self._times, self._judged = Tail(run.metrics), Tail(run.timing), Tail(run.quality)
        self._timing.clear()
        self._history: list[dict[str, Any]] = []
        self._quality: list[dict[str, Any]] = []
        self._curves = Curves(self._config.diffusion.timesteps, start.get("loss_floor"))
        self._sketches = Sketches(run, self._config.tracking.samples_every)
        self._drawn = time.monotonic() - DRAW_S / 2
        self._booked = time.monotonic()
        self._kept = start["step"]
        self._warned: dict[str, float] = {}
        self._moved = (start["step"], time.monotonic())
        self._opened: float | None = None
        online_mark(run).unlink(missing_ok=True)
        self._dashboard = open_dashboard(of_training(run, start, machine), self._config.tracking.mode, say, self._stop)
        self._opened = time.monotonic()
        if self._dashboard.is_online:
            write_atomically(online_mark(run), owner.token)

    def look(self) -> None:
        """Passes on what is new; raises whatever wandb raises."""
        for line in self._metrics.read():
            self._history.append(line)
            row = self._curves.row(line)
            if line["step"] > self._position.step:
                if line["skipped"]:
                    self._warn("skips steps", f"The gradient of step {line['step']:,} is not finite.")
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
            self._watch_progress()
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
            self._owner.check()
            path.replace(self._run.figures / "training.png")
        self._drawn = time.monotonic()

    def end(self) -> None:
        """Sends the rest after the training has ended, and its results if it has reached its last step."""
        self.look()
        self._show_time(0)
        self._sketches.close()
        state = self._timing[-1]["event"]
        if state not in list(State) and self._dashboard.is_shown:
            self._pass_traceback()
        if state == State.FINISHED:
            step = self._timing[-1]["step"]
            self._tell_end()
            pictures = sorted(self._run.figures.glob("[!.]*.png"))
            self._dashboard.show(step, {f"results/{path.stem}": path for path in pictures})
            final = self._run.checkpoints / checkpoints.folder_name(step) / checkpoints.EMA
            samples = self._run.path.glob("samples/*/manifest.json")
            files = [final, self._run.path / "experiment.json", *pictures, *sorted(samples)]
            self._keep("model", files, in_place=True)
        elif state in (State.REQUEUED, State.INTERRUPTED, State.CANCELLED):
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

    def _watch_progress(self) -> None:
        """Warns of a training that has done no step for long."""
        step, since = self._moved
        if time.monotonic() - since < STUCK_S:
            return
        now = self._run.read_status().get("step", 0)
        if step == now < self._config.train.steps:
            self._warn("makes no progress", f"It has been at step {step:,} for {STUCK_S / 60:.0f} minutes or more.")
        self._moved = (now, time.monotonic())

    def _warn(self, what: str, text: str) -> None:
        """Alerts people, of the same thing once in `ALERT_S`."""
        if self._config.tracking.alerts and time.monotonic() - self._warned.get(what, -ALERT_S) >= ALERT_S:
            self._warned[what] = time.monotonic()
            self._dashboard.alert(f"{self._run.label} {what}", f"{text}\n{self._run.path}", "WARN")

    def _tell_end(self) -> None:
        """Alerts people that the run is finished, once however often its figures are drawn again."""
        with contextlib.suppress(FileExistsError):
            self._run.path.joinpath(".told-finished-wandb").touch(exist_ok=False)
            settings = self._config.tracking
            if settings.alerts and (self._dashboard.is_online or "wandb" not in (settings.notify or ())):
                loss = self._history[-1]["loss"] if self._history else None
                text = f"step {self._timing[-1]['step']:,}" + (f", loss {loss:.4f}" if loss is not None else "")
                self._dashboard.alert(f"{self._run.label} is finished", f"{text}\n{self._run.path}", "INFO")

    def _stop(self) -> None:
        """Cancels the run, because somebody has pressed Stop on its page; wandb calls it in a thread of its own."""
        mark = self._run.path / ".stopped-by-wandb"
        begins = self._opened is None or time.monotonic() - self._opened < OLD_STOP_S
        if begins and mark.exists():
            # A server that has not forgotten it would end every `resume` at once.
            say(f"Stop on wandb's page has ended an earlier start already; now: python launch.py cancel {self._run}")
            return
        mark.touch()
        say("Stop was pressed on wandb's page: the run is cancelled.")
        command = [sys.executable, str(ROOT / "launch.py"), "cancel", str(self._run.path)]
        nothing = subprocess.DEVNULL
        subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)

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
