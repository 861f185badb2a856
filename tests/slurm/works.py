"""What the tasks of the jobs in test_task.py do."""

import json
import os
import time
from pathlib import Path

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
