"""One process of a local job: `slurm.local` starts `python -m slurm.worker`, and sends it the job through stdin."""

import os
import pickle
import signal
import sys
import threading
from typing import NoReturn


def main() -> NoReturn:
    """Receives the job, runs it, and ends with its exit code; stops if the parent dies."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    job = pickle.loads(sys.stdin.buffer.read(size))
    threading.Thread(target=_terminate_with_parent, daemon=True).start()
    code = int(job())
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by a normal exit: gloo's threads release Python objects late, and if the interpreter is gone by then, they
    # abort the process.
    os._exit(code)


def _terminate_with_parent() -> None:
    """Waits for the end of stdin, which is the parent's end: it keeps our stdin open and writes nothing more."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
