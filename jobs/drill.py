"""The drill: a training undisturbed, the same killed again and again, and whether they are equal byte for byte."""

import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import checkpoints
from jobs.reporting import read_jsonl
from jobs.run_folder import RunFolder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
Start = Callable[[str], "subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Drill:
    """What is trained, and how it is started: `start(name)` starts or continues the run of that name in `folder`."""

    folder: Path
    start: Start
    steps: int
    kills: int
    seed: int

    def run(self, say: Callable[[str], None]) -> bool:
        """Trains both, says what happens, and returns whether the results are equal; RuntimeError if one fails."""
        started = time.monotonic()
        _expect_success(self.start("whole"), "the undisturbed training")
        say(f"  undisturbed             {self.steps} steps in {time.monotonic() - started:.1f} s")
        killed = RunFolder(self.folder / "killed")
        draw = random.Random(self.seed)
        moments = sorted(draw.sample(range(1, self.steps), self.kills))
        for i, moment in enumerate(moments):
            self._kill_once(killed, moment, SIGNALS[i % len(SIGNALS)], say)
        _expect_success(self.start("killed"), "the training after the last kill")
        different = differences(RunFolder(self.folder / "whole"), killed)
        for name in different:
            say(f"  DIFFERENT: {name}")
        return not different

    def _kill_once(self, run: RunFolder, moment: int, number: signal.Signals, say: Callable[[str], None]) -> None:
        """Continues the run and sends it a signal once it has logged step `moment`."""
        process = self.start("killed")
        while process.poll() is None and last_step(run) < moment:
            time.sleep(0.002)
        at = last_step(run)
        process.send_signal(number)
        process.wait()
        kept = next(iter(checkpoints.steps(run.checkpoints)), 0)
        again = f"{at - kept} steps to do again" if at > kept else "nothing to do again"
        say(f"  {number.name:<8} at step {at:>6}   saved at step {kept}: {again}")


def differences(a: RunFolder, b: RunFolder) -> list[str]:
    """Files of the last checkpoint and metrics.jsonl that are not the same bytes in both runs."""
    step = max(checkpoints.steps(a.checkpoints))
    names = [f"checkpoints/{checkpoints.folder_name(step)}/{file}" for file in (*checkpoints.FILES, "manifest.json")]
    return [name for name in (*names, "metrics.jsonl") if not _same(a.path / name, b.path / name)]


def last_step(run: RunFolder) -> int:
    """The last step that metrics.jsonl holds, 0 before the first."""
    lines = read_jsonl(run.metrics)
    return int(lines[-1]["step"]) if lines else 0


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _expect_success(process: "subprocess.Popen[bytes]", what: str) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"{what} ended with exit code {process.returncode}")


def starter(command: Sequence[str], log: Path) -> Start:
    """Starts `command --name NAME`, what it prints going to a file."""

    def start(name: str) -> "subprocess.Popen[bytes]":
        with log.open("ab") as file:
            return subprocess.Popen([*command, "--name", name], stdout=file, stderr=file, start_new_session=True)

    return start
