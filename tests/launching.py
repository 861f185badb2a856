"""Runs launch.py as a user does: real processes, real signals."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tests.warm import EARLY, LATE, Forked, Warm, title

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    *("--train.batch-size", "64", "--train.log-every", "1", "--model.dim", "16"),
    *("--diffusion.timesteps", "50"),
)
"""Settings of a 1D run whose steps take a millisecond, and its figures a second."""
NO_FIGURES = {"LAUNCHED_WITHOUT": "matplotlib"}
"""For a forked training at whose figures a test does not look: it finds no plotting library, and ends without them."""


def slowed(module: str, name: str, seconds: float) -> dict[str, str]:
    """For a forked command that a test disturbs before it ends: the function waits so long before each of its calls."""
    return {"LAUNCHED_SLOWED": f"{module}:{name}:{seconds}"}


Process: TypeAlias = subprocess.Popen[str] | Forked

_MARKS: dict[int, str] = {}
_STARTED: list[Process] = []
_warm = functools.cache(Warm)


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def start(
    *arguments: object, cwd: Path, see_gpus: bool = False, plain: bool = False, module: str | None = None, **env: str
) -> Process:
    """Starts `launch.py ARGUMENTS` in a session of its own, where there is no GPU unless the command may see them.

    What a test expects must not depend on the machine that it runs on. `plain` is as a user starts it; without that the
    process is forked from one that has loaded torch, if it may be (`tests.warm`). `module` is started instead of
    launch.py.
    """
    mark = uuid.uuid4().hex
    plainly = plain or see_gpus or any(name.startswith(EARLY) for name in env if name not in LATE)
    assert not (plainly and {"LAUNCHED_WITHOUT", "LAUNCHED_SLOWED"} & env.keys()), "only a forked process knows these"
    whole = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else a compiler starts processes that import torch, too
        "COLUMNS": "200",
        "WANDB_MODE": "disabled",
        "DIFFUSION_PROFILE": "",
        "LAUNCHED_AS": mark,
        **({} if see_gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        **env,
    }
    command = ["-m", module] if module else [str(ROOT / "launch.py")]
    command += map(str, arguments)
    process: Process
    if plainly:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=whole,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    else:
        process = _warm().start(command, cwd, whole)
    _MARKS[process.pid] = mark
    _STARTED.append(process)
    return process


def kill_started() -> None:
    """Ends what `start` has started and what still runs; its own children end with it."""
    for process in _STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    _STARTED.clear()


def finish(process: Process, timeout_s: float = 300) -> Finished:
    out, err = process.communicate(timeout=timeout_s)
    return Finished(process.returncode, out, err)


def launch(*arguments: object, cwd: Path, see_gpus: bool = False, plain: bool = False, **env: str) -> Finished:
    """Runs `launch.py ARGUMENTS` to its end."""
    return finish(start(*arguments, cwd=cwd, see_gpus=see_gpus, plain=plain, **env))


def done(*arguments: object, cwd: Path, see_gpus: bool = False, plain: bool = False, **env: str) -> Finished:
    """Runs a command that must succeed."""
    ended = launch(*arguments, cwd=cwd, see_gpus=see_gpus, plain=plain, **env)
    assert ended.code == 0, ended
    return ended


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Polls until the condition holds; it waits longer between looks that take long, such as at Slurm's queue.

    The longer it has waited, the longer as well, up to a twentieth of a second: to look every 5 ms for minutes keeps a
    core busy 6% of the time.
    """
    started = began = time.monotonic()
    while not condition():
        now = time.monotonic()
        assert now < started + timeout_s, "the condition was not met in time"
        time.sleep(max(0.005, min(0.5, 4 * (now - began)), min(0.05, (now - started) / 50)))
        began = time.monotonic()


def steps_logged(run: Path) -> int:
    """The number of lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


def as_if_drawn(run: Path) -> None:
    """A finished run without figures (NO_FIGURES) looks as if they were drawn: the same command would draw them."""
    facts = {name: value for name, value in status(run).items() if name != "missing"}
    (run / "status.json").write_text(json.dumps(facts))


def relatives(process: Process) -> list[int]:
    """Living processes that the command has started, itself included, in whatever session they are."""
    mark = _MARKS[process.pid]
    variable, forked = f"LAUNCHED_AS={mark}".encode(), title({"LAUNCHED_AS": mark})
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            ours = variable in (folder / "environ").read_bytes().split(b"\0")
            if state != "Z" and (ours or (folder / "comm").read_text().strip() == forked):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return sorted(found)


def workers(process: Process) -> list[int]:
    """Those of its relatives that do the work: not the ones that only look on."""

    def works(pid: int) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            return False
        return b"jobs.followers" not in command and b"watcher.py" not in command

    return [pid for pid in relatives(process) if works(pid)]


def interrupt(process: Process, number: signal.Signals) -> Finished:
    process.send_signal(number)
    return finish(process)


def sentence(err: str) -> str:
    """What is printed to a user, without tyro's frame."""
    assert "Traceback" not in err, err
    return " ".join(line.strip("│╭╮╰╯─ ") for line in err.splitlines())
