"""One process of a local job: `python -m slurm.worker`, started by `slurm.local`, which sends the job through stdin."""

import os
import pickle
import signal
import sys
import threading
from typing import NoReturn


def main() -> NoReturn:
    """Receives the job, watches over the parent, and ends with the job's exit code."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    job = pickle.loads(sys.stdin.buffer.read(size))
    threading.Thread(target=_terminate_with_parent, daemon=True).start()
    code = int(job())
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's own end: gloo's threads let go of Python objects late, and abort the process if there is
    # no interpreter left to do so.
    os._exit(code)


def _terminate_with_parent() -> None:
    """The parent keeps our stdin open and never writes again: its end is the parent's end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
