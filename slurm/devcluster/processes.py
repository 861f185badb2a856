"""Starts, finds and ends the processes of one dev cluster, and waits for things to happen.

No pid file can be out of date: a cluster's processes are found by the files they hold open and by their environment.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd")

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """A running process; `name` is that of its executable, without the -wlm that Debian appends to Slurm's."""

    pid: int
    parent: int
    name: str


def wait_for(condition: Callable[[], T | None], what: str, timeout_s: float = 120) -> T:
    """Polls until `condition` is true and returns its value; TimeoutError says `what` it waited for in vain."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.1)
    return value


def spawn(argv: list[str], env: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Starts a daemon in a session of its own, out of reach of Ctrl-C, its output appended to a file."""
    with output.open("ab") as log:
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def cluster_processes(dir: Path, node: str | None = None) -> list[Process]:
    """Finds every process of the cluster in `dir`, or of one node: daemons, steps of jobs, and what those started."""
    # All daemons log below the folder; a node's slurmd and its steps share one log.
    log = f"{dir}/log/slurmd-{node}.log" if node else f"{dir}/"
    everything = {process.pid: process for process in _all_processes()}
    owned = {pid for pid, process in everything.items() if _is_daemon(process, log) or _is_in_job(pid, dir, node)}
    while more := {pid for pid, process in everything.items() if process.parent in owned} - owned:
        owned |= more
    return [everything[pid] for pid in sorted(owned)]


def _all_processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # Zombies and kernel threads have no executable and raise here, like a process that has just ended.
            name = (entry / "exe").readlink().name.removesuffix(" (deleted)").removesuffix("-wlm")
            # A process's own name stands in parentheses before that, and may hold spaces and parentheses.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        yield Process(int(entry.name), parent, name)


def _is_daemon(process: Process, log: str) -> bool:
    """Whether a daemon holds open what begins with `log`. The names matter: `tail -f` holds it open as well."""
    if process.name not in DAEMONS:
        return False
    try:
        return any(os.readlink(fd).startswith(log) for fd in Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:
        return False


def _is_in_job(pid: int, dir: Path, node: str | None) -> bool:
    """Whether a job of the cluster (on the node) started the process; it may have left its job's process tree."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return False
    # A user's shell has SLURM_CONF, too, but is on no node.
    on_node = (
        f"SLURMD_NODENAME={node}" in variables if node else any(v.startswith("SLURMD_NODENAME=") for v in variables)
    )
    return on_node and f"SLURM_CONF={dir}/slurm.conf" in variables


def send_signal(processes: list[Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def kill_all(dir: Path, node: str | None = None) -> None:
    """Kills every process of the cluster, or of one node, and also those that appear meanwhile."""

    def none_left() -> bool:
        processes = cluster_processes(dir, node)
        send_signal(processes, signal.SIGKILL)
        return not processes

    wait_for(none_left, f"the end of the processes of {node or dir}")
