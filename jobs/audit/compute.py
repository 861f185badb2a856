"""Computes a stretch of a run again, with the training's own loop, and stops where a checkpoint has other bytes."""

from contextlib import suppress
from typing import Any

from jobs.audit.plan import Part, Stretch
from jobs.health import gpu_test
from jobs.health.watchdog import COMPILING, END, SAVING, START, Watchdog
from jobs.runtime.job import JobError
from jobs.runtime.numerics import Kind, differing, facts, lacking, mixed, resolve_precision, shared
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.runtime.world import World, start
from jobs.storage import checkpoints
from jobs.storage.records import Metrics, append_timing
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress
from jobs.train.loop import capture, run_steps
from jobs.train.recorder import NoRecorder
from jobs.train.state import Training


class AuditRecorder(NoRecorder):
    """Waits at the steps at which the run has written checkpoints, until the first process has done so again."""

    found_other_bytes = False

    def __init__(self, stretch: Stretch, part: Part, training: Training, watchdog: Watchdog) -> None:
        self._stretch, self._part, self._training, self._watchdog = stretch, part, training, watchdog

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        step = self._training.step
        # Also where a part ends: the next one restores the state from there, with the settings of its own start.
        if step in self._stretch.hashes or step == self._part.stop:
            self._watchdog.phase("saving", SAVING)
            self.save()
            # Nobody needs the value: the others wait here until the first process has written.
            self._training.world.of_first(None)


class WritingRecorder(AuditRecorder):
    """Writes these checkpoints, and metrics; of files, nothing else."""

    def __init__(
        self, stretch: Stretch, part: Part, training: Training, watchdog: Watchdog, signals: SignalWatch, say: Console
    ) -> None:
        super().__init__(stretch, part, training, watchdog)
        self._signals = signals
        self._run = RunFolder(stretch.again)
        self._metrics = Metrics(self._run.metrics, training.step)
        total, batch_size = stretch.stop, training.settings.batch_size
        self._progress = Progress(say, f"audit from {stretch.start}", total, training.step, "images", batch_size)

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        if metrics is not None:
            self._metrics.add({"step": self._training.step, **metrics})
            self._metrics.write()
            self._progress.update(self._training.step, "")
        super().after_step(metrics)

    def save(self) -> None:
        snapshot = self._training.snapshot()
        # Lines first, as in a training: what comes before a checkpoint is not computed again.
        self._metrics.sync()
        # Nobody else takes over an audit's folder, so there is no owner to ask.
        checkpoints.save(self._run.checkpoints, snapshot, lambda: None)
        # A job that goes on needs the newest alone, and the ledger keeps the hashes of the others.
        with suppress(OSError):  # what cannot be deleted goes with the audit's folder
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
        # For each part, because another start of the run may have computed in another precision.
        world = start(processes, device, precision)
        gpu_test.check(world.device)
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
    recorder = AuditRecorder(stretch, part, training, watchdog)
    found = world.of_all(facts(world.device))
    if world.rank == 0:
        now = {"precision": world.precision, "grad_shards": training.shards, **shared(found)}
        unlike = [*differing(part.facts, now), *mixed(found)]
        append_timing(run, {"event": "start", "step": step, "differing": unlike, **now})
        recorder = WritingRecorder(stretch, part, training, watchdog, signals, console)
    try:
        watchdog.phase("compiling", COMPILING)
        if settings.compile == "always":  # as the start did that trained this part
            training.compile()
        capture(training, console)
        watchdog.phase("the first step", START)
        reason = run_steps(training, recorder, signals, watchdog, part.stop)
        differs = world.of_first(recorder.found_other_bytes)
        if reason is not Stop.NO and not differs:
            recorder.save()  # a job that comes back goes on from here
            raise Stopped
        return differs
    finally:
        recorder.close()
