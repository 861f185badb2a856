"""Ids of Slurm jobs as a run remembers them: an element of an array is called ARRAY_INDEX, as in 17_3."""

from collections.abc import Iterable


def element(array: str, index: int) -> str:
    return f"{array}_{index}"


def is_element(job_id: str) -> bool:
    return "_" in job_id


def elements(array: str, known: Iterable[str]) -> list[str]:
    """Those of the known ids that are elements of the array."""
    return [job_id for job_id in known if job_id.startswith(f"{array}_")]
