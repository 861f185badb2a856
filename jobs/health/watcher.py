"""The process that looks on while another one works: `watcher.py MEMORY SIGNAL FOLDER LONGEST ADVICE [at-a-terminal]`.

It imports nothing but a few modules of Python's own, because each process of a job has one. Its stdin ends when the
other process does. It counts only time in which it runs itself, so a stopped job or a machine that sleeps is no
hang. Nor is a process that a person looks into with a debugger, or has stopped at a terminal with Ctrl-Z. While nothing
can be written into the folder above FOLDER, all wait for that, for up to LONGEST seconds.
"""

import mmap
import os
import platform
import re
import select
import signal
import struct
import sys
import threading
import time
from contextlib import suppress

TICK_S = 0.5
STACKS_S = 2.0
"""Seconds that the watched process has to write its stacks; then the other processes have as many for theirs.

A disk on which no file can be written meanwhile stands still.
"""
PAUSE_S = 0.05
"""After such a pause no more lines come."""
STATES = {"T": "stopped", "D": "waiting for a disk or a network", "Z": "dead"}
"""What /proc says of a process that does not run."""
DEBUGGER = re.compile(r'File ".*\b(pdb\.py|bdb\.py|pydevd|debugpy)')
"""Is in the stacks of a process that a person looks into."""
HEADER = struct.Struct("qd")
"""How the shared memory begins: a number that changes with all progress, and the patience in seconds."""


def main() -> None:
    memory = mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ)
    dump, folder, longest_s, advice = int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]
    by_hand = "tT" if len(sys.argv) > 6 else "t"  # t is stopped by a debugger
    worker, disk = os.getppid(), Disk(os.path.dirname(folder))
    folder = os.path.join(folder, attempt(worker))
    others_hang = threading.Event()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread of its own, because a file system that hangs must not stop this process, too.
        threading.Thread(target=look_for, args=(folder, others_hang), daemon=True).start()
    silent_s, excused_s, last = 0.0, 0.0, -1
    while True:
        before = time.monotonic()
        ended = bool(select.select([0], [], [], TICK_S)[0]) and not os.read(0, 65536)
        if ended or os.getppid() != worker:
            return
        beats, patience_s = HEADER.unpack_from(memory)
        if beats != last:
            silent_s, excused_s, last = 0.0, 0.0, beats
            continue
        with suppress(ProcessLookupError, FileNotFoundError):  # it may end by itself meanwhile
            if state_of(worker) not in by_hand:
                silent_s += min(time.monotonic() - before, 2 * TICK_S)
            if silent_s - excused_s >= patience_s or others_hang.is_set():
                if silent_s < longest_s and disk.stands_still():
                    excused_s = silent_s  # and when it is back, the worker has time to go on
                    continue
                doing = memory[HEADER.size :].partition(b"\0")[0].decode(errors="replace")
                end(worker, dump, folder, advice, f"no progress for {silent_s:.0f} s in {doing}")
                silent_s = excused_s = 0.0  # a debugger has kept it alive


class Disk:
    """The file system that a folder lies on."""

    def __init__(self, folder: str) -> None:
        self._file = os.path.join(folder, f".written-{os.environ.get('RANK', '0')}")
        self._written = threading.Event()
        self._written.set()

    def stands_still(self) -> bool:
        """Writes a file, and returns whether that takes long. Asked again, it waits for the same write."""
        if self._written.is_set():
            self._written.clear()
            threading.Thread(target=self._write, daemon=True).start()
        return not self._written.wait(STACKS_S)

    def _write(self) -> None:
        with suppress(OSError):  # a full disk, too, answers
            with open(self._file, "w") as file:
                os.fsync(file.fileno())
            os.unlink(self._file)
        self._written.set()


def attempt(worker: int) -> str:
    """Returns a name that all processes of a job share and no other job has: in a container, process ids repeat."""
    meeting = os.environ.get("MASTER_PORT_FILE")
    return "-".join(meeting.split("/")[-2:]) if meeting else f"here-{worker}-{time.time_ns()}"


def look_for(folder: str, found: threading.Event) -> None:
    """Waits for the folder that the first process makes whose work hangs."""
    while not os.path.isdir(folder):
        time.sleep(1)
    found.set()


def end(worker: int, dump: int, folder: str, advice: str, what: str) -> None:
    """Writes the stacks of the worker, gives the other processes time to do the same, and kills it.

    It is left alone if a debugger is in its stacks.
    """
    state = state_of(worker)
    rank = os.environ.get("RANK", "0")
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    headline = f"process {rank} on {node}: {what}" + (f", {STATES[state]}" if state in STATES else "")
    os.kill(worker, dump)
    os.kill(worker, signal.SIGCONT)  # a stopped process handles no signal
    text = f"{headline}\n\n{stacks()}"
    if DEBUGGER.search(text):
        return
    os.kill(worker, signal.SIGSTOP)  # what was stopped must not go on now, when the job is given up
    writing = threading.Thread(target=write, args=(folder, f"process-{rank}.txt", text), daemon=True)
    writing.start()
    writing.join(STACKS_S)  # a file system that hangs must not keep the worker alive
    print(f"{headline}. Its stacks are in {folder}. {advice}".rstrip(), file=sys.stderr, flush=True)
    time.sleep(STACKS_S)
    os.kill(worker, signal.SIGKILL)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def stacks() -> str:
    """Reads what the worker writes at the signal, until it writes no more."""
    text, deadline = b"", time.monotonic() + STACKS_S
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([0], [], [], min(left, PAUSE_S if text else left))[0]:
            break
        if not (part := os.read(0, 65536)):
            break
        text += part
    return text.decode(errors="replace") or "It has not written its stacks.\n"


def write(folder: str, name: str, text: str) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
