"""What the tasks of the jobs in test_task.py do, and one that comes back."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from slurm.task import Requeue


def write_environment(requeue: Requeue) -> int:
    """Leaves the task's environment in environment-RANK.json."""
    path = Path(os.environ["SUBMITIT_FOLDER"], f"environment-{os.environ['RANK']}.json")
    path.write_text(json.dumps(dict(os.environ)))
    return 0


def end_after_the_others(requeue: Requeue) -> int:
    """Rank 0 has three seconds more to do than the others: there is nothing else to wait for."""
    if os.environ["RANK"] == "0":
        time.sleep(3)
        write_environment(requeue)
    return 0


def fail_alone(requeue: Requeue) -> int:
    """Rank 1 fails; rank 0 would wait for it for minutes, as for a collective."""
    if os.environ["RANK"] == "0":
        time.sleep(250)
    return int(os.environ["RANK"])


@dataclass(frozen=True)
class Talkative:
    """A job whose tasks have died; it says so before it decides, and leaves a file."""

    decided: Path
    retries: int = 3

    def comes_back_as(self, job_id: str) -> None:
        raise AssertionError(job_id)

    def is_done(self, cause: str | None) -> bool:
        return False

    def try_again_after(self, *arguments: object) -> bool:
        print("It is tried again.", file=sys.stderr, flush=True)
        print("It is tried again.", flush=True)
        self.decided.touch()
        return True


@dataclass(frozen=True)
class Lost(Talkative):
    """One whose controller is gone; its file says what is said of it."""

    def failed(self, rank: int, trace: str) -> None:
        self.decided.write_text(trace)

    def try_again_after(self, *arguments: object) -> bool:
        come_back = cast(Callable[[Sequence[str]], str | None], arguments[2])
        self.decided.write_text(str(come_back([])))
        return False
