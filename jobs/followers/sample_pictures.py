"""Draws samples of a checkpoint while the training goes on, on a CPU, in a process of its own.

`python -m jobs.followers.sample_pictures RUN STEP FOLDER`
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.storage import checkpoints
from jobs.storage.provenance import ROOT
from jobs.storage.run_folder import RunFolder


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
        # By multiples, because checkpoints need not come at these steps themselves.
        due = self._step // self._every < newest // self._every if self._every else False
        if not due or self._process is not None or time.monotonic() < self._next:
            return
        self._clear()
        self._folder, self._step = Path(tempfile.mkdtemp(prefix="sketch-")), newest
        self._started = time.monotonic()
        program = [sys.executable, "-m", "jobs.followers.sample_pictures"]
        command = [*program, str(self._run.path), str(newest), str(self._folder)]
        # What this process prints, the job relays to its log: drawing must not print there, too.
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._clear()

    def _clear(self) -> None:
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)


def main() -> None:
    """Draws with the averaged weights of checkpoint STEP into FOLDER."""
    run, step, folder = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    experiment = run.read_experiment()[1].build()
    model = experiment.build_model().eval()
    model.network.load_state_dict(checkpoints.load(run.checkpoints, step).ema)
    experiment.sketch(model, folder)


if __name__ == "__main__":
    main()
