"""Checkpoints, metrics, status and messages of a training, which only its first process writes."""

import errno
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion.errors import reason
from jobs import notify
from jobs.experiments.settings import TrainSettings
from jobs.followers.start import FollowerProcess, follow_training
from jobs.runtime.job import JobError, MachineError, Requeue
from jobs.runtime.surroundings import decorate
from jobs.storage import checkpoints, faults
from jobs.storage.ownership import Ownership
from jobs.storage.records import Metrics, Status, append, append_timing, cut_after, last_step, now, read_jsonl, skipped
from jobs.storage.run_folder import RunFolder, State
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress
from jobs.terminal.tables import duration
from jobs.tracking.identity import Machine
from jobs.train.state import Training

EVERY, MINUTES, GPU_MINUTES = 1000, 10.0, 1.0
"""When a checkpoint is due where nobody has said it: steps and minutes, and minutes of a GPU that is told no steps."""
TIMING_S = 5.0
"""Seconds between lines of timing.jsonl."""
JUDGE = "jobs.evaluate.beside"
"""The module that judges a checkpoint, in a process of its own."""
LAST_S = 60.0
"""Seconds that a training waits at its end until its last checkpoint is judged (--train.evaluate-every)."""
SPARED_S = 600.0
"""Seconds for which a training goes on without a disk that is not full, but fails: a server may start anew."""
SPARED_TRIES = 3
"""So often in a row must it have failed: checkpoints are minutes apart."""


class Recorder(ABC):
    """What the training loop calls to have things recorded. All processes compute the same, so one is enough."""

    @abstractmethod
    def start(self) -> None:
        """Is called when the training begins or continues."""

    @abstractmethod
    def begin(self, compile_s: float | None) -> None:
        """Is called before the first step; `compile_s` is how long compiling took, None if nothing was compiled."""

    @abstractmethod
    def after_step(self, metrics: dict[str, Any] | None) -> None:
        """Is called after each update; `metrics` is its line of metrics.jsonl, None if the step is not logged."""

    @abstractmethod
    def save(self) -> None:
        """Makes sure that a checkpoint of this step is on the disk; raises MachineError if it cannot be."""

    @abstractmethod
    def queue_again(self, requeue: Requeue, saved: str) -> bool:
        """Queues the job again; returns whether it comes back, which a process that does not record takes for granted.

        `saved` is a sentence. Raises JobError if two jobs have had their whole time limit and completed no step between
        them. A preemption is not the run's fault, however often it comes.
        """

    @abstractmethod
    def finish(self, state: State, message: str) -> None:
        """Writes down that the job ends in this state, and says `message`."""

    @abstractmethod
    def draw(self, cut_short: Callable[[], bool]) -> None:
        """Draws figures and final numbers after the last step is saved. If that fails, the run has not failed."""

    @abstractmethod
    def close(self) -> None:
        """Releases files, also after an error."""


class NoRecorder(Recorder):
    """Records nothing: for all processes but the first."""

    def start(self) -> None: ...
    def begin(self, compile_s: float | None) -> None: ...
    def after_step(self, metrics: dict[str, Any] | None) -> None: ...
    def save(self) -> None: ...
    def finish(self, state: State, message: str) -> None: ...
    def draw(self, cut_short: Callable[[], bool]) -> None: ...
    def close(self) -> None: ...
    def queue_again(self, requeue: Requeue, saved: str) -> bool:
        return True


class NodeRecorder(NoRecorder):
    """Records only how busy its node is: for the first process of a node that is not the job's first."""

    def __init__(self, run: RunFolder, owner: Ownership, machine: Machine) -> None:
        self._run, self._owner, self._machine = run, owner, machine
        self._follower: FollowerProcess | None = None

    def start(self) -> None:
        # What is said of another node belongs to no log.
        self._follower = follow_training(self._run, self._owner, self._machine, say=lambda text: None)

    def close(self) -> None:
        if self._follower is not None:
            self._follower.close(wait=False)


class RunRecorder(Recorder):
    """Writes a run's checkpoints, metrics, timing and heartbeat, and shows its progress."""

    def __init__(
        self,
        run: RunFolder,
        training: Training,
        owner: Ownership,
        console: Console,
        on_slurm: bool,
        facts: dict[str, Any],
        machine: Machine,
    ) -> None:
        settings = training.settings
        self._run, self._training, self._console, self._facts = run, training, console, facts
        self._machine = machine
        self._owner = owner
        self._status = Status(run, owner, settings.steps, on_slurm)
        # Before Metrics cuts lines: how far a job has come that was killed.
        self._reached = max(self._status.previous.get("step", 0), last_step(run.metrics))
        self._writer = checkpoints.Writer(
            run.checkpoints, settings.keep_checkpoints, training.step, owner.check, console.say, self._needed
        )
        for name, number in skipped(run.path).items():
            console.say(
                f"WARNING: {number} line{'s' if number > 1 else ''} of {name} cannot be read and count for nothing"
            )
        owner.check()  # the lines that are cut could be those of a newer job by now
        self._metrics = Metrics(run.metrics, training.step)
        cut_after(run.quality, training.step)
        self._timing: list[dict[str, Any]] = []
        """Lines that are not in the file yet."""
        self._failing: dict[str, tuple[float, int]] = {}
        """Of each record that cannot be written, since when and how often; a disk that is full does not count."""
        self._progress = Progress(console, "train", settings.steps, training.step, "images", settings.batch_size)
        self._started = self._saved_at = time.monotonic()
        self._snapshot_s = 0.0
        self._first_step = training.step
        self._clock = self._read_clock()
        self._missing: str | None = None
        self._due_after = pace(settings, training.world.device)
        self._due = False  # a checkpoint, as soon as the one before it is written
        self._follower: FollowerProcess | None = None
        self._judged = last_step(run.quality)  # or is just being judged
        self._judge: FollowerProcess | None = None
        self._ended = False

    def start(self) -> None:
        step, floor = self._training.step, self._training.loss_floor()
        marks = {"event": "start", "step": step, "restarts": self._status.values["restarts"], "loss_floor": floor}
        account = {"began": _began(), "on_slurm": self._status.values["on_slurm"], "reached": self._reached}
        heard = {"heard": self._status.previous["updated"]} if "updated" in self._status.previous else {}
        append_timing(self._run, {**marks, **account, **heard, **self._facts})
        self._status.write(step=step)
        self._follower = follow_training(self._run, self._owner, self._machine, self._console.say)

    def begin(self, compile_s: float | None) -> None:
        if compile_s is not None:
            self._console.say(f"Compiled the network in {duration(compile_s)} (--train.compile).")
        compiled = {"compile": "never" if compile_s is None else "always", "compile_s": round(compile_s or 0, 3)}
        self._mark({"event": "begin", "step": self._training.step, **compiled})
        # Rates count steps alone, so the clock starts after compiling; and only steps are worth a checkpoint.
        self._clock, self._saved_at = self._read_clock(), time.monotonic()
        self._progress.restart_clock(self._training.step)

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        step = self._training.step
        if metrics is not None:
            self._metrics.add({"step": step, **metrics})
            if self._metrics.is_due():
                with self._spared("metrics"):
                    self._owner.check()
                    self._metrics.write()
            loss = metrics["loss"]
            self._progress.update(step, "skipped" if loss is None else f"loss {loss:.4f}")
            held_out = metrics.get("held_out_loss", self._status.values["held_out_loss"])
            self._status.values.update(loss=loss, held_out_loss=held_out)
            if time.monotonic() - self._clock.time >= TIMING_S:
                self._write_timing()
        rate, eta_s = self._progress.rate, self._progress.eta_s(step)
        values = {"step": step, "rate_images_per_s": rate and round(rate, 1), "eta_s": eta_s and round(eta_s)}
        self._status.values.update(values)
        if self._status.is_due():
            with self._spared("status"):
                self._status.write()
        periods, minutes = self._due_after
        self._due |= any(step % every == 0 for every in periods)
        self._due |= time.monotonic() - self._saved_at >= 60 * minutes
        if self._due and not self._writer.is_busy(self._console.say):
            self._save()
        self._judge_newest()

    def save(self) -> None:
        if self._writer.newest != self._training.step:
            self._writer.wait()  # it may be on its way
        try:
            if self._training.step == self._training.settings.steps:
                # To be tried again from an earlier step would take the run to the same disk, and soon use up its tries.
                faults.patiently(self._save_this_step, self._console.say)
            else:
                self._save_this_step()
        except OSError as error:
            raise MachineError(f"{error}; the last good checkpoint is of step {self._writer.newest}") from None

    def queue_again(self, requeue: Requeue, saved: str) -> bool:
        step = self._training.step
        facts = {"out_of_time_at": step} if requeue.had_its_time() else {}
        if facts and step == self._first_step == self._status.values["out_of_time_at"]:
            raise JobError(
                f"no progress in two whole time limits: both times the job had to stop at step {step}. "
                "Its time limit is too short for it to start"
            )
        job_id = requeue()
        if job_id is None:
            return False
        message = f"{saved} It is queued again as job {job_id}."
        try:
            self.finish(State.REQUEUED, message, **facts)
        except OSError as error:  # it comes back, whether that can be written down or not
            self._console.say(f"WARNING: {reason(error)}")
            self._console.say(message)
        if job_id not in self._run.read_launch().get("job_ids", []):
            faults.patiently(partial(self._run.add_job, "job_ids", job_id), self._console.say)
        return True

    def finish(self, state: State, message: str, **facts: Any) -> None:
        self._progress.close()
        self._ended = True
        elapsed = time.monotonic() - self._started
        images = (self._training.step - self._first_step) * self._training.settings.batch_size
        timing = {
            "event": state,
            "step": self._training.step,
            "seconds": round(elapsed, 3),
            "images_per_s": round(images / elapsed, 1),
            "checkpoint_wait_s": self._checkpoint_wait_s(),
            "memory_mb": _memory_mb(self._training.world.device),
        }
        self._mark(timing)
        if self._missing is not None:
            facts["missing"] = self._missing
        self._status.write(state=state, step=self._training.step, eta_s=None, **facts)
        self._console.say(message)

    def draw(self, cut_short: Callable[[], bool]) -> None:
        self._progress.close()
        mark = {"event": "figures", "step": self._training.step, "checkpoint_wait_s": self._checkpoint_wait_s()}
        self._mark(mark)
        self._wait_for_judge(cut_short)
        self._missing = decorate("figures and final numbers", self._draw, self._console.say, self._console.log)

    def _draw(self) -> None:
        from diffusion.figures import training  # here, because plotting libraries take a second to import

        model = self._training.ema_model()
        self._run.figures.mkdir(exist_ok=True)
        with self._training.world.accelerator.autocast():
            lines = self._training.experiment.report(model, self._run.figures)
        for line in lines:
            self._console.say(line)
        history, quality = read_jsonl(self._run.metrics), read_jsonl(self._run.quality)
        training.training(history, read_jsonl(self._run.timing), self._run.figures / "training.png", quality)

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()
        if self._judge is not None:
            self._judge.close(wait=False)
        if self._follower is not None:
            self._follower.close(wait=self._ended)
        if self._status.values["state"] == State.FINISHED:
            notify.tell(self._run, "finished", self._console.say)

    def _judge_newest(self) -> None:
        """Has the newest checkpoint judged by a process beside, if it is its turn and none is at work."""
        step, settings = self._writer.newest, self._training.settings
        every = settings.evaluate_every
        if not every or step <= self._judged:
            return
        is_due = step == settings.steps or step // every > self._judged // every
        if is_due and (self._judge is None or self._judge.has_ended()):
            arguments = [str(self._run.path), self._owner.token, str(step)]
            self._judge = FollowerProcess(JUDGE, arguments, self._console.say)
            self._judged = step

    def _wait_for_judge(self, cut_short: Callable[[], bool]) -> None:
        """Waits until the last checkpoint is judged, `LAST_S` at most; an earlier one may be at work before."""
        said, deadline = False, time.monotonic() + LAST_S
        for _ in range(2):
            self._judge_newest()
            while self._judge is not None and not self._judge.has_ended(0.2):
                if not said:
                    self._console.say(f"Waiting for the last step to be judged, {LAST_S:.0f} s at most.")
                    said = True
                if cut_short() or time.monotonic() > deadline:
                    self._judge.close(wait=False)
                    how = f"`sample {self._run}` and `evaluate {self._run}` do it"
                    self._console.say(f"The last step was not judged; {how}.")
                    return

    def _write_timing(self) -> None:
        """Writes a line of timing.jsonl: rates, and times of a step, since the line before."""
        last, self._clock = self._clock, self._read_clock()
        steps, *spent = (now - then for now, then in zip(self._clock, last, strict=True))
        if steps == 0:
            return
        step_s, data_s, communication_s, checkpoint_s = (seconds / steps for seconds in spent)
        parts = {
            "step_s": step_s,
            "data_s": data_s,
            "compute_s": max(0.0, step_s - data_s - checkpoint_s - communication_s),
            "communication_s": communication_s,
            "checkpoint_s": checkpoint_s,
        }
        timing = {
            "event": "progress",
            "step": self._clock.step,
            "images_per_s": round(self._training.settings.batch_size / step_s, 1),
            **{name: round(seconds, 6) for name, seconds in parts.items()},
            "memory_mb": _memory_mb(self._training.world.device),
        }
        self._mark(timing)

    def _mark(self, line: dict[str, Any]) -> None:
        """Appends a line to timing.jsonl, and those before it that could not be written."""
        self._timing.append({"time": now(), **line})
        with self._spared("timing"):
            while self._timing:
                append(self._run.timing, self._timing[0])
                del self._timing[0]

    @contextmanager
    def _spared(self, record: str) -> Iterator[None]:
        """While entered, a small record that cannot be written ends no training: its steps need no disk."""
        try:
            yield
        except OSError as error:
            if not self._failing:
                self._console.say(f"WARNING: {reason(error)}; it is written when it can be")
            self._bear(record, error)
        else:
            self._failing.pop(record, None)

    def _bear(self, record: str, error: OSError) -> None:
        """Raises the error if a record has failed for `SPARED_S`: another node may still have the disk.

        A disk that is full is so for all nodes, and steps are worth keeping in memory until it has room.
        """
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        since, tries = (time.monotonic(), 0) if is_full else self._failing.get(record, (time.monotonic(), 0))
        self._failing[record] = since, tries + 1
        if time.monotonic() - since >= SPARED_S and tries + 1 >= SPARED_TRIES:
            raise error

    def _read_clock(self) -> "_Clock":
        training, saving_s = self._training, self._checkpoint_wait_s()
        return _Clock(training.step, time.monotonic(), training.data_s, training.communication_s, saving_s)

    def _needed(self) -> set[int]:
        """The steps of the checkpoints that are kept besides the newest ones."""
        settings, folder = self._training.settings, self._run.checkpoints
        best = checkpoints.lowest(folder) if settings.keep_best else set()
        judged = {self._judged} if self._judge is not None and not self._judge.has_ended() else set()
        kept = judged | checkpoints.firsts(checkpoints.steps(folder), settings.keep_every)
        return best | self._run.drawn_steps() | kept

    def _checkpoint_wait_s(self) -> float:
        """How long this job's steps have waited for checkpoints so far."""
        return round(self._writer.waited_s + self._snapshot_s, 6)

    def _save_this_step(self) -> None:
        """Raises OSError if that fails; the reason has been said."""
        if self._writer.newest != self._training.step:
            self._save()
            self._writer.wait()
        if self._writer.newest != self._training.step:
            raise OSError(f"step {self._training.step} could not be saved")

    def _save(self) -> None:
        started = time.perf_counter()
        snapshot = self._training.snapshot()
        self._snapshot_s += time.perf_counter() - started
        self._saved_at, self._due = time.monotonic(), False
        try:
            # Lines first: a resume can make the lines after a checkpoint again, but not those before it.
            self._metrics.sync()
        except OSError as error:
            self._console.say(f"WARNING: no checkpoint was written, because its lines cannot be: {reason(error)}")
            self._bear("lines", error)
        else:
            self._failing.pop("lines", None)
            self._writer.write(snapshot)


def pace(settings: TrainSettings, device: torch.device) -> tuple[set[int], float]:
    """Returns when a checkpoint is due: at multiples of these numbers of steps, and so many minutes after the last."""
    every, minutes = settings.checkpoint_every, settings.checkpoint_minutes
    if every is None and device.type != "cpu":
        return {settings.evaluate_every, settings.keep_every} - {0}, minutes or GPU_MINUTES
    return {every or EVERY}, minutes or MINUTES


class _Clock(NamedTuple):
    """A moment of a training, with the seconds spent so far on data, on exchanging gradients and on checkpoints."""

    step: int
    time: float
    data_s: float
    communication_s: float
    checkpoint_s: float


def _memory_mb(device: torch.device) -> int:
    """Returns the most memory that this process has used; of the GPU, if it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10  # Linux counts in kB


def _began() -> str:
    """When this process began: long before its first step, because it had to import torch and to meet the others."""
    # Field 22 of proc(5): ticks from boot on. Fields are counted behind the name, which may hold blanks and brackets.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now(ago_s=age_s)
