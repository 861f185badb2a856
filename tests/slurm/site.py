"""A folder and a real Slurm to submit trainings from, and what the tests ask of them."""

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster
from tests.launching import NO_FIGURES, Finished, done, finish, launch, start, status, steps_logged, wait_until
from tests.warm import NO_MATPLOTLIB

STEPS = 160
"""Each costs two processes 10 CPU ms. They save at 40, 80, ...; most tests disturb them at 50, with work to lose."""
HERE = (
    *("train", "1d", "--model.dim", "16", "--train.batch-size", "64", "--train.log-every", "1"),
    *("--diffusion.timesteps", "21"),  # for figures that take less time
    *("--train.checkpoint-every", "40", "--device", "cpu"),
)
TRAINING = (
    *HERE,
    *("--cluster", "slurm", "--slurm.cpus-per-gpu", "1", "--slurm.gpus-per-node", "2"),
    *("--slurm.time-min", "10", "--slurm.signal-delay-s", "30"),
)

UPDATE = "        self.step += 1\n"
"""Where a step of a training begins, in jobs/train/state.py."""
SLOW = (
    UPDATE
    + """\
        import os, time
        if not os.path.exists({hurry!r}):
            time.sleep({seconds})
"""
)
"""The same, with a pause for as long as a file is not there."""
HELD_STEP = 100
START = "    experiment, config = run.read_experiment()\n"
"""Where a training begins, in jobs/train/loop.py, before its first step."""
DRAW = "            write_shard(samples, shard, "
"""Where a task begins with a shard, in jobs/sample/draw.py."""


class Site:
    """A folder and a cluster to submit from."""

    def __init__(self, root: Path, cluster: DevCluster) -> None:
        self.root, self.cluster = root, cluster

    def launch(self, *arguments: object, **env: str) -> Finished:
        return launch(*arguments, cwd=self.root, **self.cluster.env, **env)

    def train(self, name: str, gpus: int, *more: object, steps: int = STEPS, slow: bool = False) -> Path:
        """Submits a training and returns its run folder.

        If it is `slow`, its steps pause until `finish`: then there is time to disturb the training, and what has to
        wait for Slurm keeps no core from others. It finds no plotting library in its copy of the code, because figures
        take as long as all else that it computes.
        """
        submitted = self.launch(*TRAINING, "--train.steps", steps, "--gpus", gpus, "--name", name, *more)
        assert submitted.code == 0, submitted
        assert "Submitted" in submitted.out, submitted
        run = self.root / "runs" / "1d" / name
        shutil.copy(NO_MATPLOTLIB / "matplotlib.py", run / "code")
        if slow:
            slow_down(run, run / "code", endless=steps != STEPS)
        return run

    def job_id(self, run: Path) -> str:
        job_ids: list[str] = json.loads((run / "launch.json").read_text())["job_ids"]
        return job_ids[-1]

    def log(self, run: Path) -> str:
        return "".join(path.read_text() for path in sorted((run / "slurm").glob("*_log.out")))

    def wait_for_step(self, run: Path, step: int) -> None:
        wait_until(lambda: steps_logged(run) >= step or state(run) == "failed", timeout_s=120)
        assert state(run) != "failed", self.log(run)

    def wait_for_state(self, run: Path, *states: str, timeout_s: float = 240) -> None:
        wait_until(lambda: state(run) in states, timeout_s=timeout_s)

    def finish(self, run: Path) -> None:
        hurry(run).touch()
        wait_until(lambda: state(run) in ("finished", "failed", "cancelled"), timeout_s=300)
        assert state(run) == "finished", self.log(run)
        self.cluster.wait_for_job(self.job_id(run), "COMPLETED", timeout_s=240)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder to read that `make` has filled; of several processes of pytest, the first that needs it does it for all.

    Another `name` for each `make`.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the whole session
    folder, whole = root / name, root / f"{name}-whole"
    with (root / f"{name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what one that has failed has left
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def trained_here(root: Path, gpus: int) -> Path:
    """Trains what `Site.train` does without Slurm, undisturbed; returns the run folder."""
    done(*HERE, "--train.steps", STEPS, "--gpus", gpus, "--name", f"calm-{gpus}", cwd=root, **NO_FIGURES)
    return root / "runs" / "1d" / f"calm-{gpus}"


def checkpoint_made_here(root: Path, gpus: int, step: int, steps: int) -> Path:
    """Trains to a step of a longer run without Slurm, undisturbed; returns the checkpoint's folder."""
    here = ("--train.checkpoint-every", step, "--gpus", gpus, "--name", "calm")
    training = start(*HERE, "--train.steps", steps, *here, cwd=root)
    folder = root / "runs" / "1d" / "calm" / "checkpoints" / f"step-{step:08d}"
    wait_until(lambda: folder.is_dir() or training.poll() is not None, timeout_s=300)
    assert folder.is_dir()
    training.kill()
    finish(training)
    return folder


def asks(script: str) -> dict[str, str | None]:
    """The flags of a script; None is the value of those that have none."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    flags = [line.partition("=") for line in lines]
    assert len({flag for flag, _, _ in flags}) == len(flags), script
    return {flag: shlex.split(value)[0] if equals else None for flag, equals, value in flags}


@contextmanager
def tidied(cluster: DevCluster) -> Iterator[None]:
    """Leaves no job behind."""
    yield
    cluster.run("scancel", "--user", "root", "--full")
    for name in cluster.nodes:
        cluster.wait_for_node(name, "IDLE")


def change(path: Path, marker: str, text: str) -> None:
    """Puts a text into the place of a marker, in a copy of the code."""
    code = path.read_text()
    assert code.count(marker) == 1
    path.write_text(code.replace(marker, text))


def hurry(run: Path) -> Path:
    """The file that ends the pauses of a slow run; beside its folder, whose files are compared."""
    return run.with_name(f"{run.name}-hurry")


def slow_down(run: Path, code: Path, endless: bool = False) -> None:
    """Lets each step pause, in a copy of the code that is about to start.

    A run that could end before a test has disturbed it pauses for a second from HELD_STEP on: that is a minute, which
    ends with the disturbance. Before that, a fiftieth of a second is enough. An endless run pauses for longer: it goes
    on for as long as the test waits for Slurm, and `checkpoint_made_here` makes as many steps again.
    """
    seconds = "0.1" if endless else f"0.02 if self.step < {HELD_STEP} else 1"
    change(code / "jobs" / "train" / "state.py", UPDATE, SLOW.format(hurry=str(hurry(run)), seconds=seconds))


def state(run: Path) -> str | None:
    return status(run)["state"] if (run / "status.json").exists() else None


def task_pids(run: Path) -> list[int]:
    """The processes of the job's tasks, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(e.split(b"=", 1) for e in (folder / "environ").read_bytes().split(b"\0") if b"=" in e)
        except OSError:
            continue
        if (
            b"submitit.core._submit" in command
            and str(run / "slurm").encode() in command
            and b"SLURM_PROCID" in environment
        ):
            if command[0].endswith(b"srun"):
                continue
            found[int(environment[b"SLURM_PROCID"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def restarts(run: Path) -> int:
    return int(status(run).get("restarts", 0)) if (run / "status.json").exists() else 0


def restarted(run: Path) -> bool:
    return restarts(run) >= 1 and state(run) in ("running", "finished")
