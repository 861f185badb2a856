"""The drill trains twice, once undisturbed and once killed again and again, and compares the results byte for byte."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from diffusion.errors import OutsideError
from jobs.storage import checkpoints, ownership
from jobs.storage.records import last_step
from jobs.storage.run_folder import RunFolder, State

Process = subprocess.Popen[bytes]
Start = Callable[[str, int], Process]
Disturb = Callable[[Process, RunFolder], None]
"""Stops the training in this folder, which was started as this process; returns when it has stopped."""


@dataclass(frozen=True)
class Drill:
    """A drill: what is trained, how it is started, and how it is disturbed."""

    folder: Path
    start: Start
    """Starts or continues the run of this name in `folder`, on so many processes; its own ends when the run does."""
    disturbances: Mapping[str, Disturb]
    """Ways to stop it, by name; they are used in turn."""
    steps: int
    kills: int
    seed: int
    processes: Sequence[int]
    """How many the run that is killed has, from start to start; the first ones are the undisturbed training's."""

    def run(self, say: Callable[[str], None]) -> bool:
        """Trains both, says what happens, and returns whether the results are equal; OutsideError if one fails."""
        started = time.monotonic()
        _expect_success(self.start("whole", self.processes[0]), "the undisturbed training")
        say(f"  undisturbed             {self.steps} steps in {time.monotonic() - started:.1f} s")
        killed = RunFolder(self.folder / "killed")
        processes = itertools.cycle(self.processes)
        process = self._begin(killed, next(processes))
        moments = sorted(random.Random(self.seed).sample(range(1, self.steps), self.kills))
        for moment, (name, disturb) in zip(moments, itertools.cycle(self.disturbances.items()), strict=False):
            if process.poll() is not None:
                process = self._begin(killed, next(processes))
            self._disturb_once(process, killed, moment, name, disturb, say)
        if process.poll() is not None:
            process = self.start("killed", next(processes))
        _expect_success(process, "the training after the last interruption")
        different = differences(RunFolder(self.folder / "whole"), killed)
        for name in different:
            say(f"  DIFFERENT: {name}")
        return not different

    def _begin(self, run: RunFolder, processes: int) -> Process:
        """Starts the run and waits until this start has begun to train; older lines of its files do not count."""
        while ownership.is_locked(run.path):  # by processes that save themselves, because their launcher was killed
            time.sleep(0.01)
        before = run.read_status().get("restarts")
        process = self.start(run.path.name, processes)
        while process.poll() is None and run.read_status().get("restarts") == before:
            time.sleep(0.002)
        return process

    def _disturb_once(
        self, process: Process, run: RunFolder, moment: int, name: str, disturb: Disturb, say: Callable[[str], None]
    ) -> None:
        """Waits until the run has logged step `moment`, and disturbs it."""
        # Looked at often: a training of this size makes hundreds of steps a second, and is to be stopped near this one.
        while process.poll() is None and last_step(run.metrics) < moment:
            time.sleep(0.002)
        at = last_step(run.metrics)
        disturb(process, run)
        if run.state() is State.FINISHED:
            say(f"  {name:<16} came too late: the training had reached its last step")
            return
        kept = next(iter(checkpoints.steps(run.checkpoints)), 0)
        again = f"{at - kept} steps to do again" if at > kept else "nothing to do again"
        say(f"  {name:<16} at step {at:>6}   saved at step {kept}: {again}")


def by_signal(number: signal.Signals) -> Disturb:
    """Returns a way to stop a training: it sends a signal and waits for the end of the process."""

    def disturb(process: Process, run: RunFolder) -> None:
        process.send_signal(number)
        process.wait()

    return disturb


SIGNALS = {n.name: by_signal(n) for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}


def on_its_job(act: Callable[[str], None]) -> Disturb:
    """Returns a way to disturb a training: it acts on the run's Slurm job and waits until the job has begun again."""

    def disturb(process: Process, run: RunFolder) -> None:
        before = run.read_status()["restarts"]
        act(run.read_launch()["job_ids"][-1])
        while process.poll() is None and run.read_status().get("restarts") == before:
            time.sleep(0.05)

    return disturb


def differences(a: RunFolder, b: RunFolder) -> list[str]:
    """Returns which files, of the last checkpoint and metrics.jsonl, do not have the same bytes in both runs."""
    step = max(checkpoints.steps(a.checkpoints))
    names = [
        f"checkpoints/{checkpoints.folder_name(step)}/{file}" for file in (*checkpoints.FILES, checkpoints.MANIFEST)
    ]
    return [name for name in (*names, "metrics.jsonl") if not _same(a.path / name, b.path / name)]


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _expect_success(process: Process, what: str) -> None:
    if process.wait() != 0:
        raise OutsideError(f"{what} ended with exit code {process.returncode}")


@contextmanager
def trainings(command: Sequence[str], log: Path, cancel: Callable[[], None]) -> Iterator[Start]:
    """Yields a function that starts `command --name NAME --gpus N`; what it prints goes to a file.

    If the drill ends early, also by SIGTERM or a closed terminal, what it has started is told to end. On Slurm that
    ends the waiting alone; then `cancel` is called, to end what is left.
    """
    started: list[Process] = []

    def start(name: str, processes: int) -> Process:
        with log.open("ab") as file:
            # One thread, unless somebody wants more: the model is small, and the machine may have other work.
            env = {"OMP_NUM_THREADS": "1", **os.environ}
            command_of_run = [*command, "--name", name, "--gpus", str(processes)]
            # A session of its own: Ctrl-C in the drill's terminal is not one of the disturbances.
            training = subprocess.Popen(command_of_run, env=env, stdout=file, stderr=file, start_new_session=True)
        started.append(training)
        return training

    # A terminal that closes ends nothing under nohup.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: handler for n in numbers if (handler := signal.getsignal(n)) != signal.SIG_IGN}

    def leave(number: int, frame: object) -> NoReturn:
        for heard in previous:  # whoever insists gets no other end: terminals send SIGHUP twice
            signal.signal(heard, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in previous:
        signal.signal(number, leave)
    try:
        yield start
    finally:
        living = [training for training in started if training.poll() is None]
        for training in living:
            training.terminate()
            training.wait()
        if living:
            cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
