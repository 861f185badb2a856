"""Who may write into a run folder.

A lock keeps a second job of this machine out. A token keeps an old job on another machine from writing: the job that
took the run over last owns it.
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusion.errors import OutsideError, UserError
from jobs.files import write_json

LOCK, SAMPLING = ".lock", ".sampling"
"""Files below a run's folder that those who train it, and those who draw its samples, hold open."""
MOMENT_S = 10
"""Seconds to wait for somebody who changes a file."""
LOCKS = "another file system for --runs-dir; Lustre needs the mount option flock"
"""What helps where files cannot be locked."""


class Superseded(OutsideError):
    """Another job has taken this run over; the one that gets this must stop without writing."""


@contextmanager
def locked(run: Path, lock: str = LOCK) -> Iterator[int | None]:
    """Locks a run, or what another `lock` in its folder stands for, for this machine.

    Yields None if a living process has it locked; raises UserError if nobody can. Else yields a file descriptor; child
    processes that inherit it keep the lock. The kernel drops the lock when the last process that holds the descriptor
    ends, however it ends: a dead writer never locks anybody out.
    """
    # Writable, because NFS makes a byte-range lock of flock, and an exclusive one needs a descriptor that may write.
    descriptor = os.open(run / lock, os.O_RDWR | os.O_CREAT, 0o666)
    # flock belongs to the open file, not to the process: children that inherit the descriptor hold it as well. The
    # file is never deleted: one process could lock the deleted file while another locks a new one of the same name.
    try:
        yield descriptor if _try_lock(descriptor, run) else None
    finally:
        os.close(descriptor)


@contextmanager
def for_a_moment(lock: Path) -> Iterator[None]:
    """Keeps others out while a file is read, changed and written; where that takes long or cannot be, goes on."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + MOMENT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # for milliseconds, unless its holder has been stopped
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


@contextmanager
def sampling(run: Path) -> Iterator[int]:
    """Makes this process one of the run's `holders`, without locking anybody out; yields a file descriptor."""
    descriptor = os.open(run / SAMPLING, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, run: Path) -> bool:
    for _ in range(2):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)  # it may have been `is_locked`, which looks for a moment
        except OSError as error:
            raise UserError(f"files in {run} cannot be locked: {error.strerror}; what helps is {LOCKS}") from None
        else:
            return True
    return False


def is_locked(run: Path) -> bool | None:
    """Whether a living process has the folder locked, None if that cannot be found out; nothing is written."""
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that two who look at the same moment do not take each other for a writer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def holders(run: Path) -> list[int]:
    """The processes of this machine that train the run or draw its samples, without those that one of them started."""
    # Resolved, as paths are that /proc shows.
    files = {str(run.resolve() / name) for name in (LOCK, SAMPLING)}
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # proc(5): behind the name, which may hold blanks and brackets, come the state and the parent.
            if any(os.readlink(descriptor) in files for descriptor in (folder / "fd").iterdir()):
                parents[int(folder.name)] = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:  # another user's process, or one that has just ended
            continue
    return [pid for pid, parent in parents.items() if parent not in parents]


@dataclass(frozen=True)
class Ownership:
    """The right to write, until another job takes it: on a cluster, an old job may still be alive on another node."""

    run: Path
    token: str

    @staticmethod
    def take(run: Path) -> "Ownership":
        token = uuid.uuid4().hex
        write_json(run / ".writer.json", {"token": token})
        return Ownership(run, token)

    def check(self) -> None:
        """Raises Superseded if the run has been taken over; to be called right before every write."""
        try:
            token = json.loads((self.run / ".writer.json").read_text())["token"]
        except FileNotFoundError:
            raise Superseded(f"{self.run} has been moved or deleted") from None
        if token != self.token:
            raise Superseded(f"another job has taken over {self.run}; this one stops without writing")
