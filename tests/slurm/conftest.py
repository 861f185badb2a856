"""The real Slurm that the tests marked `slurm` share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster
from tests.slurm.site import Site, tidied


@pytest.fixture(scope="session")
def cluster() -> Iterator[DevCluster]:
    """Two nodes with four pretended GPUs each, accounting, and preemption by the job's own signal.

    test_sites.py has it refuse jobs by a site's rules. Without Slurm the tests fail, as they should: `-m "not slurm"`
    leaves them out.
    """
    # A short path, since sockets lie below it. The cluster itself removes it, unless it cannot start.
    with (
        tempfile.TemporaryDirectory(prefix="devcluster-", ignore_cleanup_errors=True) as dir,
        DevCluster.start(dir, accounting=True, user_signal=True, gpu_type="a100", job_submit=True) as cluster,
    ):
        yield cluster


@pytest.fixture
def tidy(cluster: DevCluster) -> Iterator[DevCluster]:
    """The shared cluster, on which no job is left afterwards."""
    with tidied(cluster):
        yield cluster


@pytest.fixture
def site(tidy: DevCluster, tmp_path: Path) -> Site:
    """The shared cluster, from a folder of the test's own."""
    return Site(tmp_path, tidy)
