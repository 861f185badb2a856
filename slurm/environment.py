"""The environment that new jobs are submitted from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_ABOUT_THIS_JOB = ("SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""Set by Slurm; all other SBATCH_ variables are the user's own, such as SBATCH_ACCOUNT."""


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Hides what Slurm, submitit and torch have told the job that this is, salloc's included, if it is one.

    sbatch hands it on to the new job, whose srun would read it as options, contradictory ones perhaps.
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
