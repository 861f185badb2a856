"""`python -m tests.jobs.warned RUN JOB_ID WHY` is a training on Slurm that is told to save before its first step.

JOB_ID is what queueing it again answers, "" if it has been cancelled; WHY is `limit` or `preempted`.
"""

import os
import signal
import sys
from pathlib import Path

from jobs.train.job import TrainJob


class Requeue:
    """Answers as the command line says."""

    def __call__(self) -> str | None:
        return sys.argv[2] or None

    def had_its_time(self) -> bool:
        return sys.argv[3] == "limit"


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    os.kill(os.getpid(), signal.SIGUSR2)
    sys.exit(TrainJob(Path(sys.argv[1]), 1, "cpu")(Requeue()))
