"""Computes a stretch of a run again, with the training's own loop, and stops where a checkpoint has other bytes."""

from typing import Any

from jobs.audit.plan import Part, Stretch
from jobs.health.watchdog import COMPILING, END, START, Watchdog
from jobs.runtime.job import JobError
from jobs.runtime.numerics import Kind, differing, facts, lacking, resolve_precision
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.runtime.world import World, start
from jobs.storage import checkpoints
from jobs.storage.records import Metrics, append_timing
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress
from jobs.train.loop import capture, run_steps
from jobs.train.recorder import NoRecorder, Recorder
from jobs.train.state import Training


class AuditRecorder(NoRecorder):
    """Writes checkpoints at the steps at which the run has written them, and metrics; of files, nothing else."""

    def __init__(self, stretch: Stretch, part: Part, training: Training, signals: SignalWatch, say: Console) -> None:
        self.found_other_bytes = False
        self._stretch, self._part, self._training, self._signals = stretch, part, training, signals
        self._run = RunFolder(stretch.again)
        self._metrics = Metrics(self._run.metrics, training.step)
        total, batch_size = stretch.stop, training.settings.batch_size
        self._progress = Progress(say, f"audit from {stretch.start}", total, training.step, "images", batch_size)

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        step = self._training.step
        if metrics is not None:
            self._metrics.write({"step": step, **metrics})
            self._progress.update(step, "")
        if step in self._stretch.hashes or step == self._part.stop:
            self.save()

    def save(self) -> None:
        snapshot = self._training.snapshot()
        self._metrics.sync()
        checkpoints.save(self._run.checkpoints, snapshot, lambda: None)
        checkpoints.prune(self._run.checkpoints, keep=1)
        if self._stretch.different() is not None:
            self.found_other_bytes = True
            # What follows cannot be equal. All processes stop at the same step, as after a signal.
            self._signals.requested = max(self._signals.requested, Stop.REQUEUE)

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()


def compute(stretch: Stretch, processes: int, device: Kind, signals: SignalWatch, watchdog: Watchdog) -> None:
    """Computes what is missing of a stretch; raises Stopped when a signal comes."""
    for part in stretch.parts:
        precision = resolve_precision(part.config.train.precision, device)
        if unfit := lacking(precision, device):
            raise JobError(unfit)
        world = start(processes, device, precision)
        if _compute(stretch, part, world, signals, watchdog):
            break
    watchdog.phase("the end", END)
    world.close()


def _compute(stretch: Stretch, part: Part, world: World, signals: SignalWatch, watchdog: Watchdog) -> bool:
    """Computes a part of a stretch, and returns whether a checkpoint has other bytes than the run's."""
    run, settings, console = RunFolder(stretch.again), part.config.train, Console(None)
    # Only the first process writes, so it alone knows how far this has come.
    step = world.of_first(next(iter(checkpoints.steps(run.checkpoints)), 0))
    if step >= part.stop:
        return stretch.different() is not None
    training = Training(part.config.build(), settings, world)
    if step:
        checkpoints.verify(run.checkpoints, step)
        training.restore(checkpoints.load(run.checkpoints, step))
    recorder: Recorder = NoRecorder()
    if world.rank == 0:
        now = {"precision": world.precision, "grad_shards": training.shards, **facts(world.device)}
        append_timing(run, {"event": "start", "step": step, "differing": differing(part.facts, now), **now})
        recorder = AuditRecorder(stretch, part, training, signals, console)
    try:
        if settings.compile:
            watchdog.phase("compiling", COMPILING)
            training.compile()
        capture(training, console)
        watchdog.phase("the first step", START)
        reason = run_steps(training, recorder, signals, watchdog, part.stop)
        differs = world.of_first(getattr(recorder, "found_other_bytes", False))
        if reason is not Stop.NO and not differs:
            recorder.save()  # a job that comes back goes on from here
            raise Stopped
        return differs
    finally:
        recorder.close()
