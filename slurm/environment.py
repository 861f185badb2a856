"""The environment of a job: new ones are submitted from one, and a single process here starts in one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_ABOUT_THIS_JOB = ("SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""Slurm sets these; all other SBATCH_ variables are the user's own, such as SBATCH_ACCOUNT."""

_OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
)
"""By variables that begin so, torchrun, mpirun and pods tell their processes of each other."""


def copies() -> int:
    """Returns how many copies of this command torchrun or mpirun has started."""
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
    with clean_env():
        os.environ.update(kept)
        yield
