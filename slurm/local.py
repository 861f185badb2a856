"""Runs one job in several processes on this machine; if the parent dies, they stop."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    told: list[int] = []
    with tempfile.TemporaryDirectory(prefix="meeting-") as meeting:
        children = _start(pickle.dumps(job), processes, keep_open, f"{meeting}/port")

        def forward(number: int, frame: FrameType | None) -> None:
            told.append(number)
            _send(children, number)

        # nohup has it ignored, and then a terminal that closes is no reason to stop.
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        previous = {number: signal.signal(number, forward) for number in set(signals.SAVE) - nohup}
        try:
            return replace(_wait(children), was_told_to_stop=bool(told))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def environment(rank: int, processes: int, port_file: str) -> dict[str, str]:
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
        "MASTER_PORT_FILE": port_file,
        # -P keeps the working folder out of sys.path, so what the job imports has to be named.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _alone() -> dict[str, str]:
    """Returns the environment of a process that has no others to find: as if it were this one."""
    return {**os.environ, "PYTHONPATH": environment(0, 1, "")["PYTHONPATH"]}


def _start(job: bytes, processes: int, keep_open: Sequence[int], port_file: str) -> list[subprocess.Popen[bytes]]:
    children = []
    for rank in range(processes):
        child = subprocess.Popen(
            # -P: the user's folder may hold a slurm.py or a queue.py, too.
            [sys.executable, "-u", "-P", "-m", "slurm.worker"],
            env=environment(rank, processes, port_file) if processes > 1 else _alone(),
            stdin=subprocess.PIPE,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            # In a session of its own, so that Ctrl-C on the terminal reaches the parent alone, which passes it on.
            start_new_session=True,
            pass_fds=keep_open,
        )
        children.append(child)
    for child in children:
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has died already, which `_wait` will see
            child.stdin.write(len(job).to_bytes(8, "big") + job)
            child.stdin.flush()  # it stays open: the worker terminates when it closes
    return children


def _wait(children: list[subprocess.Popen[bytes]]) -> Outcome:
    """Waits for all processes; ends the others after the first failure."""
    ranks = {child.pid: rank for rank, child in enumerate(children)}
    codes: dict[int, int] = {}
    failure: Outcome | None = None
    killer = threading.Timer(GRACE_S, _send, [children, signal.SIGKILL])
    while ranks:
        # Not one child after the other: the first may hang for ever because the second has failed.
        pid, status = os.wait()
        if pid not in ranks:  # os.wait tells of any child of this process
            continue
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        # os.wait has taken the end from Popen: without this, `_send` could signal another process of the same pid.
        codes[rank] = children[rank].returncode = code
        if code not in (0, 130) and failure is None:  # 130 is one that has saved, because it was told to stop
            failure = Outcome(1, rank, signal.Signals(-code).name if code < 0 else None)
            _send(children, signal.SIGTERM)
            killer.start()
    killer.cancel()
    for child in children:
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.close()
    return failure or Outcome(max(codes.values()))


def _send(children: list[subprocess.Popen[bytes]], number: int) -> None:
    """Signals those that `_wait` has not seen the end of; Popen's own methods would take the end of one from it."""
    for child in children:
        if child.returncode is None:
            os.kill(child.pid, number)
