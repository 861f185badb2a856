"""The environment that new jobs are submitted from, and what a job's own says of the network."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm.profile import INTERFACES

_ABOUT_THIS_JOB = ("SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""Slurm sets these; all other SBATCH_ variables are the user's own, such as SBATCH_ACCOUNT."""


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Hides the variables by which Slurm, submitit and torch describe the job that this process is in, if it is in one.

    sbatch would hand them on to the new job, whose srun would read them as options, perhaps contradictory ones. A shell
    of salloc is in a job, too.
    """
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and not name.startswith(_ABOUT_THIS_JOB))
    }
    with clean_env():
        os.environ.update(kept)
        yield


def network(interface: str, devices: Path = Path("/sys/class/net")) -> dict[str, str]:
    """Returns the variables that name a network interface; auto is the first fast one that is up, {} without one.

    Fast is InfiniBand (type 32 of Linux) and Slingshot, whose interfaces are called hsn0, hsn1, ...
    """
    if interface == "auto":
        fast = [
            device.name
            for device in sorted(devices.iterdir())
            if (device / "operstate").read_text().strip() == "up"
            and (device.name.startswith("hsn") or (device / "type").read_text().strip() == "32")
        ]
        if not fast:
            return {}
        interface = fast[0]
    return dict.fromkeys(INTERFACES, interface)
