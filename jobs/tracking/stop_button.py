"""Stop on a run's page of wandb."""

import subprocess
import sys
import time
from collections.abc import Callable

from jobs.storage.provenance import ROOT
from jobs.storage.run_folder import RunFolder

OLD_STOP_S = 25.0
"""So soon after a start, Stop may have been pressed before it: wandb asks when it starts and 15 s later."""


class StopButton:
    """Cancels the run when somebody presses Stop on its page."""

    def __init__(self, run: RunFolder, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._opened: float | None = None

    def opened(self) -> None:
        """Says that wandb has started: its answers are soon those of this start."""
        self._opened = time.monotonic()

    def press(self) -> None:
        """Cancels the run, unless an earlier start has obeyed already; wandb calls it in a thread of its own."""
        mark = self._run.path / ".stopped-by-wandb"
        begins = self._opened is None or time.monotonic() - self._opened < OLD_STOP_S
        if begins and mark.exists():
            # A server that has not forgotten it would end every `resume` at once.
            earlier = "Stop on wandb's page has ended an earlier start already"
            self._say(f"{earlier}; now: python launch.py cancel {self._run}")
            return
        mark.touch()
        self._say("Stop was pressed on wandb's page: the run is cancelled.")
        # As a command: nothing in jobs/ knows how a job on Slurm is ended.
        # By a shell that leaves at once, because the follower kills its own children when it ends, and this command
        # waits until the run has ended.
        command = ["sh", "-c", '"$@" &', "sh", sys.executable, f"{ROOT}/launch.py", "cancel", str(self._run.path)]
        nothing = subprocess.DEVNULL
        subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, check=False)
