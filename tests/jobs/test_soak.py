"""The long repetitions, `make soak`: hundreds of kills at random moments."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.storage import checkpoints
from tests.jobs.test_resume import CODES, disturb, result, run_folder, uninterrupted  # noqa: F401, a fixture
from tests.launching import TINY, done, finish, start, status, wait_until

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
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
