"""Runs one job in several processes on this machine; if the parent dies, they stop."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from slurm import signals

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 5.0
"""Seconds that the others may take to end after one process has failed; they may hang in a collective without it."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int
    failed_rank: int = 0
    """The first process that failed, if one did."""
    signal: str | None = None
    """The name of the signal that ended it, if one did."""
    was_told_to_stop: bool = False
    """Whether this process has been sent a signal that means "save"."""


def run(job: Callable[[], int], processes: int, *, keep_open: Sequence[int] = ()) -> Outcome:
    """Calls the picklable `job` in `processes` processes, with torchrun's environment variables, and waits for them.

    Signals are passed on to all of them. If one fails, the others are ended. If this process dies, they get SIGTERM.
    They inherit the file descriptors `keep_open`.
    """
    children = _start(pickle.dumps(job), processes, keep_open)
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in signals.SAVE}
    try:
        return replace(_wait(children), was_told_to_stop=bool(told))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Returns this process's environment, with the variables that torch.distributed and Accelerate read."""
    cores = len(os.sched_getaffinity(0))
    return {
        # Each process of a run needs the same number of threads, or sums are rounded differently.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _alone(port: int) -> dict[str, str]:
    """Returns the environment of a process that has no others to find: as if it were this one."""
    return {**os.environ, "PYTHONPATH": environment(0, 1, port)["PYTHONPATH"]}


def _start(job: bytes, processes: int, keep_open: Sequence[int]) -> list[subprocess.Popen[bytes]]:
    port = _free_port()
    children = []
    for rank in range(processes):
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "slurm.worker"],
            env=environment(rank, processes, port) if processes > 1 else _alone(port),
            stdin=subprocess.PIPE,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            # In a session of its own, so that Ctrl-C on the terminal reaches the parent alone, which passes it on.
            start_new_session=True,
            pass_fds=keep_open,
        )
        children.append(child)
    for child in children:
        assert child.stdin is not None
        child.stdin.write(len(job).to_bytes(8, "big") + job)
        child.stdin.flush()  # it stays open: the worker terminates when it closes
    return children


def _wait(children: list[subprocess.Popen[bytes]]) -> Outcome:
    """Waits for all processes; ends the others after the first failure."""
    ranks = {child.pid: rank for rank, child in enumerate(children)}
    codes: dict[int, int] = {}
    failure: Outcome | None = None
    killer = threading.Timer(GRACE_S, _kill, [children])
    while ranks:
        pid, status = os.wait()
        if pid not in ranks:
            continue
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        codes[rank] = children[rank].returncode = code
        if code not in (0, 130) and failure is None:
            failure = Outcome(1, rank, signal.Signals(-code).name if code < 0 else None)
            for child in children:
                child.terminate()
            killer.start()
    killer.cancel()
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    return failure or Outcome(max(codes.values()))


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
