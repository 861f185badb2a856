"""The real Slurm that the tests marked `slurm` share."""

import tempfile
from collections.abc import Iterator

import pytest

from slurm.devcluster import DevCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[DevCluster]:
    """Two nodes with four pretended GPUs each, accounting, and preemption by the job's own signal.

    Without Slurm the tests fail, as they should: `-m "not slurm"` leaves them out.
    """
    # A short path, since sockets lie below it. The cluster itself removes it, unless it cannot start.
    with (
        tempfile.TemporaryDirectory(prefix="devcluster-", ignore_cleanup_errors=True) as dir,
        DevCluster.start(dir, accounting=True, user_signal=True) as cluster,
    ):
        yield cluster
