"""Everything that the first process of a training does for the outside; the other processes have a `NullRecorder`."""

import resource
import time
from typing import Any

import torch

from jobs import checkpoints
from jobs.job import JobError
from jobs.ownership import Ownership
from jobs.progress import Console, Progress
from jobs.reporting import Metrics, Status, append_timing, read_jsonl
from jobs.run_folder import RunFolder
from jobs.training import Training


class NullRecorder:
    """Keeps nothing: every process computes the same, one of them records it."""

    def start(self) -> None:
        """The training begins or continues."""

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        """An update is done; `metrics` is given where it is logged."""

    def save(self) -> None:
        """Makes sure that a checkpoint of this step is on the disk; raises JobError if it cannot be."""

    def check_progress(self) -> None:
        """Before the job is queued again: raises JobError if it has got nowhere, and neither did the time before."""

    def finish(self, state: str, message: str, **facts: Any) -> None:
        """The job ends in this state."""

    def came_back_as(self, job_id: str) -> None:
        """The job is queued again under this id."""

    def draw(self) -> None:
        """The last step is done: figures and final numbers."""

    def close(self) -> None:
        """Releases files, whatever has happened."""


class RunRecorder(NullRecorder):
    """Checkpoints, metrics, timing, heartbeat and progress of a run."""

    def __init__(
        self, run: RunFolder, training: Training, owner: Ownership, console: Console, facts: dict[str, Any]
    ) -> None:
        settings = training.settings
        self._run, self._training, self._console, self._facts = run, training, console, facts
        self._owner = owner
        self._status = Status(run, owner, settings.steps)
        keep = settings.keep_checkpoints
        self._writer = checkpoints.Writer(run.checkpoints, keep, training.step, owner.check, console.say)
        self._metrics = Metrics(run.metrics, training.step)
        self._progress = Progress(console, "train", settings.steps, training.step, "images", settings.batch_size)
        self._started = self._saved_at = time.monotonic()
        self._snapshot_s = 0.0
        self._first_step = training.step

    def start(self) -> None:
        restarts = self._status.values["restarts"]
        append_timing(self._run, {"event": "start", "step": self._training.step, "restarts": restarts, **self._facts})
        self._status.write(step=self._training.step)

    def after_step(self, metrics: dict[str, Any] | None) -> None:
        step, settings = self._training.step, self._training.settings
        if metrics is not None:
            self._owner.check()
            self._metrics.write({"step": step, **metrics})
            loss = metrics["loss"]
            self._progress.update(step, "skipped" if loss is None else f"loss {loss:.4f}")
            self._status.beat(loss=loss)
        rate, eta_s = self._progress.rate, self._progress.eta_s(step)
        self._status.beat(step=step, rate_images_per_s=rate and round(rate, 1), eta_s=eta_s and round(eta_s))
        late = time.monotonic() - self._saved_at >= 60 * settings.checkpoint_minutes
        if step % settings.checkpoint_every == 0 or late:
            self._save()

    def save(self) -> None:
        if self._writer.newest != self._training.step:
            self._writer.wait()  # it may be on its way
        if self._writer.newest != self._training.step:
            self._save()
            self._writer.wait()
        if self._writer.newest != self._training.step:
            step, good = self._training.step, self._writer.newest
            raise JobError(f"step {step} could not be saved; the last good checkpoint is of step {good}")

    def check_progress(self) -> None:
        step = self._training.step
        if step == self._first_step == self._status.values.get("requeued_at"):
            raise JobError(
                f"no progress between two requeues: both times the job had to stop at step {step}. "
                "Its time limit may be too short for it to start"
            )

    def finish(self, state: str, message: str, **facts: Any) -> None:
        self._progress.close()
        elapsed = time.monotonic() - self._started
        waited = self._writer.waited_s + self._snapshot_s
        images = (self._training.step - self._first_step) * self._training.settings.batch_size
        timing = {
            "event": state,
            "step": self._training.step,
            "seconds": round(elapsed, 3),
            "images_per_s": round(images / elapsed, 1),
            "checkpoint_wait_s": round(waited, 4),
            "memory_mb": _memory_mb(self._training.world.device),
        }
        append_timing(self._run, timing)
        self._status.write(state=state, step=self._training.step, eta_s=None, **facts)
        self._console.say(message)

    def came_back_as(self, job_id: str) -> None:
        known = self._run.read_launch().get("job_ids", [])
        if job_id not in known:
            self._run.update_launch(job_ids=[*known, job_id])

    def draw(self) -> None:
        self._progress.close()
        history = read_jsonl(self._run.metrics)
        model = self._training.ema_model()
        self._run.figures.mkdir(exist_ok=True)
        with self._training.world.accelerator.autocast():
            lines = self._training.experiment.report(model, history, self._run.figures)
        for line in lines:
            self._console.say(line)

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()

    def _save(self) -> None:
        started = time.perf_counter()
        snapshot = self._training.snapshot()
        self._snapshot_s += time.perf_counter() - started
        self._metrics.sync()
        self._writer.write(snapshot)
        self._saved_at = time.monotonic()


def _memory_mb(device: torch.device) -> int:
    """The most memory that this process has used, on the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10  # Linux counts in kB
