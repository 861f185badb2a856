"""The environment of a job: new ones are submitted from one, a single process here starts in one; and its network."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import digits

from slurm.profile import INTERFACES

_ABOUT_THIS_JOB = ("SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""Slurm sets these; all other SBATCH_ variables are the user's own, such as SBATCH_ACCOUNT."""

_OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
)
"""Variables that begin so are how torchrun, mpirun and pods tell their processes of each other."""


def copies() -> int:
    """Returns how many copies of this command torchrun or mpirun has started."""
    # WORLD_SIZE alone may be a pod's or a leftover, with this command started once: torchrun also sets its run's id.
    sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *(["WORLD_SIZE"] if "TORCHELASTIC_RUN_ID" in os.environ else [])]
    return max([1, *(int(size) for name in sizes if (size := os.environ.get(name, "")).isdecimal())])


def forget_other_launchers() -> None:
    """Takes out what would make a job of one process look for others, and wait for them for ever."""
    for name in [name for name in os.environ if name.startswith(_OF_LAUNCHERS)]:
        del os.environ[name]


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
    # clean_env also hides SLURM_CONF, which says where the cluster is, and what the user has set for sbatch.
    with clean_env():
        os.environ.update(kept)
        yield


def network(interface: str, devices: Path = Path("/sys/class/net")) -> dict[str, str]:
    """Returns the variables that name a network interface; auto are the fast ones that are up, {} without one.

    Fast is InfiniBand (type 32 of Linux) and Slingshot, whose interfaces are called hsn0, hsn1, ... NCCL's sockets use
    several of one name, gloo the first.
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
        alike = [name for name in fast if name.rstrip(digits) == fast[0].rstrip(digits)]
        return {**dict.fromkeys(INTERFACES, fast[0]), "NCCL_SOCKET_IFNAME": ",".join(alike)}
    return dict.fromkeys(INTERFACES, interface)
