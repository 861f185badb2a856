"""Alerts about a training, which wandb passes on to people."""

import contextlib
import time

from jobs.experiments.configs import ExperimentConfig
from jobs.storage.run_folder import RunFolder
from jobs.tracking.dashboard import ALERT_S, Dashboard

STUCK_S = 600.0
"""A training that does no step for so many seconds makes no progress."""


class Alerts:
    """Tells people that a training skips steps, makes no progress or is finished, if they want alerts."""

    def __init__(self, run: RunFolder, config: ExperimentConfig, dashboard: Dashboard, step: int) -> None:
        """`step` is where this start begins."""
        self._run, self._config, self._dashboard = run, config, dashboard
        self._warned: dict[str, float] = {}
        self._moved = (step, time.monotonic())

    def skipped(self, step: int) -> None:
        """Warns of a step that was skipped."""
        self._warn("skips steps", f"The gradient of step {step:,} is not finite.")

    def watch_progress(self) -> None:
        """Warns of a training that has done no step for long."""
        step, since = self._moved
        if time.monotonic() - since < STUCK_S:
            return
        newest = self._run.read_status().get("step", 0)
        # At the last step figures are drawn, which may take long.
        if step == newest < self._config.train.steps:
            self._warn("makes no progress", f"It has been at step {step:,} for {STUCK_S / 60:.0f} minutes or more.")
        self._moved = (newest, time.monotonic())

    def finished(self, step: int, loss: float | None) -> None:
        """Tells that the run is finished, once however often its figures are drawn again."""
        with contextlib.suppress(FileExistsError):
            self._run.told("finished-wandb").touch(exist_ok=False)
            settings = self._config.tracking
            # Where wandb is offline, jobs.notify tells it if it was asked to.
            if settings.alerts and (self._dashboard.is_online or "wandb" not in (settings.notify or ())):
                text = f"step {step:,}" + (f", loss {loss:.4f}" if loss is not None else "")
                self._dashboard.alert(f"{self._run.label} is finished", f"{text}\n{self._run.path}", "INFO")

    def _warn(self, what: str, text: str) -> None:
        """Alerts people, about the same thing at most once in `ALERT_S`."""
        if self._config.tracking.alerts and time.monotonic() - self._warned.get(what, -ALERT_S) >= ALERT_S:
            self._warned[what] = time.monotonic()
            self._dashboard.alert(f"{self._run.label} {what}", f"{text}\n{self._run.path}", "WARN")
