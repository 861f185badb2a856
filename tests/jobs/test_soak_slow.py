"""The long repetition in which nothing fails but all is slow, part of `make soak`: the watchdog must let it live."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from jobs.storage import checkpoints
from tests.jobs.test_soak import send
from tests.launching import TINY, Process, done, finish, relatives, start, status, steps_logged, wait_until, workers

pytestmark = pytest.mark.soak

MINUTES = float(os.environ.get("SOAK_SLOW_MINUTES", "60"))
STEPS = 6000
COMMAND = (
    *("train", "1d", *TINY, "--train.steps", STEPS, "--train.checkpoint-every", 100, "--train.held-out-every", 250),
    *("--train.grad-shards", 2, "--device", "cpu"),
)
KEPT = ("metrics.jsonl", *(f"checkpoints/step-{STEPS:08d}/{name}" for name in (*checkpoints.FILES, "manifest.json")))
WITHIN_S = 40.0
"""A pause that a process is allowed: a third less than the watchdog's minute, because others take time, too."""
SLEEP_S = 65.0, 150.0
"""So long a job stands still as a whole: longer than a minute."""
KINDS = ("pause", "pause", "sleep", "at the lowest priority", "mostly stopped", "on one core", "calm")


def test_slow_but_living_runs_under_heavy_load_are_no_hang(tmp_path: Path) -> None:
    """One training after the other, with starts, saves, held-out losses and figures; all give the same bytes."""
    done(*COMMAND, "--name", "calm", cwd=tmp_path)
    chance = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    deadline = time.monotonic() + 60 * MINUTES
    runs = tmp_path / "runs" / "1d"
    with heavy_load():
        while time.monotonic() < deadline:
            run = runs / f"slow-{len([*runs.iterdir()])}"
            process = start(*COMMAND, "--gpus", 2, "--name", run.name, cwd=tmp_path, plain=True)
            while process.poll() is None and time.monotonic() < deadline:
                slow_down(chance.choice(KINDS), process, run, chance)
                wait_for_progress(process, run)
            ended = finish(process, timeout_s=3600)
            assert ended.code == 0, ended
            assert not (run / "hang").exists()
            assert not (run / "faults.jsonl").exists()
            assert (status(run)["state"], status(run)["restarts"]) == ("finished", 0)
            assert [name for name in KEPT if (run / name).read_bytes() != (runs / "calm" / name).read_bytes()] == []
            print(f"{time.strftime('%X')} {run.name} has finished", flush=True)


@contextmanager
def heavy_load() -> Iterator[None]:
    """Keeps each core busy with something else."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def slow_down(kind: str, process: Process, run: Path, chance: random.Random) -> None:
    """Slows processes of a job down for a while."""
    everybody, working = relatives(process), workers(process)
    seconds = chance.uniform(0, WITHIN_S)
    print(f"{time.strftime('%X')} {run.name}, step {steps_logged(run)}: {kind}", flush=True)
    match kind:
        case "pause":
            some = chance.sample(everybody, chance.randint(1, len(everybody))) if everybody else []
            stand_still(some, seconds, chance)
        case "sleep":  # as a laptop does
            stand_still(everybody, chance.uniform(*SLEEP_S), chance)
        case "at the lowest priority":
            prioritize(working, 19)
            time.sleep(seconds)
            prioritize(relatives(process), 0)
        case "mostly stopped":
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                stand_still(working, 0.9, chance)
                time.sleep(0.1)
        case "on one core":
            cores = os.sched_getaffinity(0)
            bind(everybody, {min(cores)})
            time.sleep(seconds)
            bind(relatives(process), cores)
        case "calm":
            time.sleep(seconds)


def stand_still(pids: Collection[int], seconds: float, chance: random.Random) -> None:
    send(signal.SIGSTOP, *chance.sample([*pids], len(pids)))
    time.sleep(seconds)
    send(signal.SIGCONT, *chance.sample([*pids], len(pids)))


def prioritize(pids: Collection[int], niceness: int) -> None:
    for thread in threads(pids):
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def bind(pids: Collection[int], cores: Collection[int]) -> None:
    for thread in threads(pids):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def threads(pids: Collection[int]) -> list[int]:
    return [int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").glob("*")]


def wait_for_progress(process: Process, run: Path) -> None:
    """Waits until each process has made a step, so that the next pause is not one with the last."""
    enough = min(steps_logged(run) + 3, STEPS)
    saved = run / "checkpoints" / f"step-{STEPS:08d}"

    def is_ahead() -> bool:
        return steps_logged(run) >= enough and (enough < STEPS or saved.exists())

    wait_until(lambda: is_ahead() or process.poll() is not None, timeout_s=1800)
