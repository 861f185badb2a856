"""`python -m slurm.after FOLDER CODE LOG_START` is what a job's script runs after srun has failed with CODE.

It outlives the tasks, so it decides for them whether the job is tried again, however they have died. It also queues the
job again for tasks that cannot, because they are in a container. LOG_START is the size that the log had before srun.
"""

import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from slurm import queue, task
from slurm.task import Retried

END = re.compile(r"^srun: error: (\S+): tasks? ([\d,\- ]+): (.+)$", re.MULTILINE)
"""How srun says that tasks have ended: `srun: error: n1: task 2: Killed`."""
PATIENCE_S = 3600.0
"""The controller may be away for long, and a job ends only when it is back."""


class _Log(io.TextIOBase):
    """One of the script's streams, which are the job's log. What a full disk has no room for decides over no job."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(self._number, text.encode(errors="replace"))
        return len(text)


def main() -> int:
    with redirect_stdout(_Log(1)), redirect_stderr(_Log(2)):
        return _decide()


def _decide() -> int:
    from submitit.core.job_environment import JobEnvironment
    from submitit.core.utils import DelayedSubmission

    folder, code, log_start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to us as well
    queue.PATIENCE_S = PATIENCE_S
    # submitit sets it in its tasks alone; its paths and ours (`task._folder`) are read from it.
    os.environ["SUBMITIT_FOLDER"] = folder
    # Cancelled, or queued again already: then what follows is decided.
    if not task.is_current():
        return code
    submitted: Any = DelayedSubmission.load(JobEnvironment().paths.submitted_pickle)
    job, wish = submitted.function.work, task.wish()
    # The script's stderr is the job's log, so nothing here has to know what the file is called.
    with Path("/proc/self/fd/2").open("rb") as log:
        log.seek(log_start)
        cause, node = first_end(log.read().decode(errors="replace"))
    cluster = submitted.function.cluster

    def come_back(left_out: Sequence[str]) -> str | None:
        try:
            new = task.requeue(left_out)
        except queue.Unanswered as error:
            print(error, file=sys.stderr)
            return None
        return None if new is None else queue.on_cluster(cluster, new)

    if wish.exists():
        # Before the job is queued again: Slurm may then end this script, and the next attempt could find the wish.
        wish.unlink()
        new = come_back([])
        if new is None:
            job.failed(0, "the job could not be queued again")
        else:
            job.comes_back_as(new)
    elif isinstance(job, Retried):
        if job.is_done(cause):
            return 0
        job.try_again_after(cause, node, come_back, queue.on_cluster(cluster, task.own_id()))
    return code


def first_end(log: str) -> tuple[str | None, str | None]:
    """Returns which signal has ended a task first, and on which node; no signal if the task has ended by itself.

    The tasks after the first are ended because of it.
    """
    found = END.search(log)
    if found is None:
        return None, None
    node, tasks, how = found.groups()
    if how.startswith("Exited"):
        return None, node
    return f"task {tasks} was ended: {how}", node


if __name__ == "__main__":
    sys.exit(main())
