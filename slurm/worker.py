"""One process of a local job: `slurm.local` starts `python -m slurm.worker`, and sends it the job through stdin."""

import os
import pickle
import signal
import sys
import threading
from typing import NoReturn


def main() -> NoReturn:
    """Receives the job, runs it, and ends with its exit code; stops if the parent dies."""
    leave(work())


def work() -> int:
    """Receives the job and runs it; returns its exit code."""
    size = int.from_bytes(_read(8), "big")
    job = pickle.loads(_read(size))
    # Only now: what comes before is the job, and this thread would read parts of it as signals.
    threading.Thread(target=_listen_to_parent, daemon=True).start()
    return int(job())


def leave(code: int) -> NoReturn:
    """Ends this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by a normal exit: gloo's threads release Python objects late, and if the interpreter is gone by then, they
    # abort the process.
    os._exit(code)


def _read(size: int) -> bytes:
    """Reads so many bytes from stdin, and none of those that follow."""
    # Not through sys.stdin, whose buffer would swallow the signals that follow.
    content = b""
    while len(content) < size:
        if not (part := os.read(0, size - len(content))):
            raise EOFError("the parent has ended before it has sent the job")
        content += part
    return content


def _listen_to_parent() -> None:
    """Sends this process the signals whose numbers the parent writes, and SIGTERM when the parent dies."""
    while number := os.read(0, 1):
        os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
