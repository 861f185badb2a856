"""What Slurm knows: whether it is there, and which jobs wait or run."""

import os
import shutil
import subprocess
from collections.abc import Iterable


def is_available() -> bool:
    """Whether jobs are better submitted than run here: there is Slurm, and this is no job already."""
    return "SLURM_JOB_ID" not in os.environ and has_slurm()


def has_slurm() -> bool:
    """Whether sbatch exists and the controller answers within two seconds."""
    if shutil.which("sbatch") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return " is UP" in done.stdout


def active(job_ids: Iterable[str]) -> dict[str, str]:
    """Those of the jobs that wait, run or are coming to an end, with their states, such as {"17": "PENDING"}.

    Raises RuntimeError if Slurm does not answer.
    """
    wanted = set(job_ids)
    if not wanted or shutil.which("squeue") is None:
        return {}
    # All of the user's jobs: asked for single ones, squeue fails if it has forgotten one of them.
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"squeue does not answer: {done.stderr.strip()}")
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {job_id: state for job_id, state in states.items() if job_id in wanted}
