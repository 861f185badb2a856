"""The long repetitions, `make soak`: hundreds of kills at random moments."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder, State
from tests.disturbances import block, fill, small_disk
from tests.jobs.test_resume import CODES, disturb, result, run_folder, uninterrupted  # noqa: F401, a fixture
from tests.launching import (
    NO_FIGURES,
    TINY,
    Process,
    done,
    finish,
    relatives,
    start,
    status,
    steps_logged,
    wait_until,
    workers,
)

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
MISFORTUNE_DRAWS = int(os.environ.get("SOAK_MISFORTUNES", "50"))
SECONDS = 10.0
"""For so long a disk is full, or takes nothing."""
DRAWS = int(os.environ.get("SOAK_DRAWS", "20"))


def test_sigkill_at_random_moments_of_a_run_that_checkpoints_constantly(tmp_path: Path) -> None:
    """Every checkpoint that is visible is whole, none is ever lost, and the last equals one of an undisturbed run."""
    chance = random.Random(1)
    command = ("train", "1d", *TINY, "--train.steps", "1000000")
    run, calm = (tmp_path / "runs" / "1d" / name for name in ("killed", "calm"))
    newest = 0
    for restarts in range(KILLS):
        process = start(*command, "--name", "killed", "--train.checkpoint-every", "3", cwd=tmp_path)
        wait_until(lambda n=restarts: (run / "status.json").exists() and status(run)["restarts"] == n)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        finish(process)
        kept = checkpoints.newest(run / "checkpoints", pytest.fail) or 0
        assert kept >= newest
        newest = kept
        for step in checkpoints.steps(run / "checkpoints"):
            checkpoints.verify(run / "checkpoints", step)
    assert newest > KILLS
    process = start(*command, "--name", "calm", "--train.checkpoint-every", newest, cwd=tmp_path)
    wait_until(lambda: checkpoints.steps(calm / "checkpoints") == [newest], timeout_s=600)
    process.kill()
    finish(process)
    folder = f"checkpoints/{checkpoints.folder_name(newest)}"
    for name in (*checkpoints.FILES, "manifest.json"):
        assert (run / folder / name).read_bytes() == (calm / folder / name).read_bytes()
    lines = [(path / "metrics.jsonl").read_bytes().splitlines()[:newest] for path in (run, calm)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("draw", range(DRAWS))
def test_random_interruptions_at_random_steps(
    draw: int,
    uninterrupted: Callable[[str, int], dict[str, bytes]],  # noqa: F811
    tmp_path: Path,
    mnist_root: Path,
) -> None:
    """A property: for any k, any kind of interruption and 1, 2 or 4 processes, the result is the same bytes."""
    chance = random.Random(draw)
    processes = chance.choice([1, 2, 4])
    precision = chance.choice(["fp32", "bf16"])
    env = {"MNIST_ROOT": str(mnist_root)}
    expected = uninterrupted(precision, processes)
    lines = expected["metrics"].count(b"\n")
    run = run_folder(tmp_path, precision, "disturbed")
    for at_line in sorted(chance.sample(range(1, lines), 3)):
        kind = chance.choice([*CODES])
        if run.exists() and status(run)["state"] in ("failed", "finished"):
            break
        disturb(kind, tmp_path, precision, processes, at_line, env)
    if not (run.exists() and status(run)["state"] == "finished"):
        done("resume", run, "--device", "cpu", "--gpus", processes, cwd=tmp_path, **env)
    assert result(run) == expected


SHARED = (*TINY, "--train.steps", "1500", "--train.checkpoint-every", "50", "--train.grad-shards", "2")
KEPT = ("metrics.jsonl", *(f"checkpoints/step-00001500/{name}" for name in (*checkpoints.FILES, "manifest.json")))
MISFORTUNES = ("stop", "pause", "kill", "kill all", "preempt", "cancel", "block", "fill")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    root = tmp_path_factory.mktemp("calm")
    done("train", "1d", *SHARED, "--name", "a", "--device", "cpu", cwd=root, **NO_FIGURES)
    return root / "runs" / "1d" / "a"


@pytest.mark.parametrize("draw", range(MISFORTUNE_DRAWS))
def test_whatever_comes_the_run_is_tried_again_and_ends_with_the_same_bytes(
    draw: int, calm: Path, tmp_path: Path
) -> None:
    """Nothing but the command that started the run is typed again, where somebody has ended it."""
    chance = random.Random(draw)
    with small_disk(tmp_path / "disk", megabytes=24) as disk:
        run = disk / "1d" / "a"
        for kind in [*chance.sample(MISFORTUNES, 3), None]:
            gpus = chance.choice([1, 2])
            where = ("--device", "cpu", "--gpus", gpus, "--retries", 3, "--runs-dir", disk)
            process = start("train", "1d", *SHARED, "--name", "a", *where, cwd=tmp_path, WATCHDOG_S="2", **NO_FIGURES)
            # All processes are watched now; the first step is seconds away.
            wait_until(lambda p=process, n=gpus: watchers(p) == n or p.poll() is not None, timeout_s=120)
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0, 3))
            else:
                line = steps_logged(run) + chance.randrange(400)
                wait_until(lambda p=process, n=line: steps_logged(run) >= n or p.poll() is not None, timeout_s=120)
            if kind is not None and process.poll() is None:
                befall(kind, process, run, disk, chance)
            ended = finish(process)
            # It may have ended before it wrote its first status.
            state = RunFolder(run).state()
            assert state is not State.FAILED, (kind, ended)
            # What comes when the run has finished ends processes that only have to leave.
            assert ended.code in (0, 130, -signal.SIGKILL) or state is State.FINISHED, (kind, ended)
            wait_until(lambda p=process: not relatives(p))
        assert status(run)["state"] == "finished"
        assert [name for name in KEPT if (run / name).read_bytes() != (calm / name).read_bytes()] == []


def watchers(process: Process) -> int:
    return len(relatives(process)) - len(workers(process))


def befall(kind: str, process: Process, run: Path, disk: Path, chance: random.Random) -> None:
    """Lets something happen to a run. The launcher itself is not stopped: nobody could notice that."""
    victim = chance.choice([pid for pid in workers(process) if pid != process.pid] or [process.pid])
    match kind:
        case "stop":
            send(signal.SIGSTOP, victim)
        case "pause":
            send(signal.SIGSTOP, victim)
            time.sleep(1)
            send(signal.SIGCONT, victim)
        case "kill":
            send(signal.SIGKILL, victim)
        case "kill all":
            send(signal.SIGKILL, *relatives(process))
        case "preempt" | "cancel":
            process.send_signal(signal.SIGUSR2 if kind == "preempt" else signal.SIGTERM)
        case "block":
            block(run / "checkpoints", SECONDS)
        case "fill":
            fill(disk, SECONDS)


def send(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def test_sampling_killed_again_and_again(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "50", "--name", "a", cwd=tmp_path)
    command = ("sample", "1d", "--num-samples", "2000000", "--sampler", "ddim", "--steps", "20")
    done(*command, "--name", "whole", cwd=tmp_path)
    folder = tmp_path / "runs" / "1d" / "a" / "samples"
    chance, killed = random.Random(2), 0
    while not (folder / "killed" / "samples.npz").exists():
        where = ("--name", "killed", "--device", "cpu", "--gpus", chance.choice([1, 2, 4]))
        process = start(*command, *where, cwd=tmp_path)
        time.sleep(chance.uniform(3, 12))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        finish(process)
    done(*command, "--name", "killed", cwd=tmp_path)
    assert killed
    for path in sorted((folder / "whole").iterdir()):
        assert path.read_bytes() == (folder / "killed" / path.name).read_bytes()
