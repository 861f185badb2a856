"""Starts the processes that follow a job. wandb works in them, so it can neither slow nor stop a training."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.runtime.signals import SIGNALS
from jobs.storage.ownership import Ownership
from jobs.storage.provenance import ROOT
from jobs.storage.run_folder import RunFolder
from jobs.tracking.identity import Machine, ensure_id

Say = Callable[[str], None]

PATIENCE_S = 30.0
"""Seconds that a finished job waits for its follower, which gives up earlier by itself."""


def online_mark(run: RunFolder) -> Path:
    """Returns the file that is there if the last start was tracked online; it holds the token of that start."""
    return run.path / ".tracking-online"


class FollowerProcess:
    """The job's handle of a process that follows it, `python -m MODULE ARGUMENTS`; `say` gets what it prints."""

    def __init__(self, module: str, arguments: list[str], say: Say) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._module, self._say = module, say
        # Libraries must not start threads on the cores that train, nor touch its GPU.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # A job's signals reach all its processes, but a follower ends when the job has: it inherits this mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,  # `-m` looks for modules here first
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                text=True,
                errors="replace",
            )
            # A daemon: a job that does not wait for its follower must be able to end while that one still prints.
            threading.Thread(target=_relay, args=(self._process, say), daemon=True).start()
        except (OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
            say(f"No process could be started beside the job, {module} does nothing: {error}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether the process has ended by itself, or does so within these seconds."""
        if self._process is not None:
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                return False
            if self._process.returncode != 0:
                self._say(f"WARNING: {self._module} has ended before its work was done: {self._process.returncode}")
            self.close(wait=False)
            self._process = None
        return True

    def close(self, wait: bool) -> None:
        """Tells the process that the job has ended; if `wait`, waits until it has written everything."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()  # it sees the same when this process is killed
        if wait:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_S)


def machine_of(processes: Sequence[tuple[str, str | None]], rank: int) -> Machine | None:
    """Returns what belongs to the job on this node if this process is the first one there, otherwise None.

    `processes` are the node and the GPU (its UUID) of each process of the job.
    """
    nodes = [node for node, _ in processes]
    own = nodes[rank]
    if nodes.index(own) != rank:
        return None
    # All processes of a node have one parent, which only waits for them: the launcher, or Slurm's slurmstepd. Where
    # other users' processes are hidden, that one is.
    parent = os.getppid()
    tree = nodes.count(own) > 1 and Path(f"/proc/{parent}/stat").exists()
    return Machine(
        pid=parent if tree else os.getpid(),
        tree=tree,
        gpus=[gpu for node, gpu in processes if node == own and gpu is not None],
        node=own,
        nodes=len(set(nodes)),
        is_first=rank == 0,
    )


def follow_training(run: RunFolder, owner: Ownership, machine: Machine, say: Say) -> FollowerProcess:
    """Follows a training until it is closed; on a node that is not the job's first, only how busy that node is."""
    if machine.is_first:
        ensure_id(run)
    arguments = [str(run.path), owner.token, json.dumps(dataclasses.asdict(machine))]
    return FollowerProcess("jobs.followers.training", arguments, say)


@contextmanager
def following(run: RunFolder, name: str, is_complete: Callable[[], bool], live: bool, say: Say) -> Iterator[None]:
    """Follows the set of samples `name`: while it is drawn if `live`, otherwise once this process has completed it."""
    arguments = [str(run.path), name]
    ensure_id(run)
    follower = FollowerProcess("jobs.followers.parts", arguments, say) if live else None
    try:
        yield
        if follower is None and is_complete():
            follower = FollowerProcess("jobs.followers.parts", arguments, say)
    finally:
        if follower is not None:
            follower.close(wait=True)


def follow_evaluation(run: RunFolder, name: str, say: Say) -> None:
    """Passes the complete evaluation of the set of samples `name` on to wandb."""
    ensure_id(run)
    FollowerProcess("jobs.followers.parts", [str(run.path), name, "evaluation"], say).close(wait=True)


def _relay(process: "subprocess.Popen[str]", say: Say) -> None:
    assert process.stdout is not None
    with process.stdout, contextlib.suppress(OSError):
        for line in process.stdout:
            say(line.rstrip())
