"""Ids of Slurm jobs as a run remembers them: 17, an element of an array 17_3, with a cluster's name west:17_3."""

from collections.abc import Iterable


def element(array: str, index: int) -> str:
    return f"{array}_{index}"


def is_element(job_id: str) -> bool:
    return "_" in number(job_id)


def number(job_id: str) -> str:
    """Returns the id without the name of a cluster: files of the job are called so."""
    return job_id.rpartition(":")[2]


def log_of(job_id: str) -> str:
    """Returns the name of the file that the job's first process prints into, which submitit chooses."""
    return f"{number(job_id)}_0_log.out"


def elements(array: str, known: Iterable[str]) -> list[str]:
    """Those of the known ids that are elements of the array."""
    return [job_id for job_id in known if job_id.startswith(f"{array}_")]
