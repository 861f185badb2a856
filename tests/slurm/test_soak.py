"""The long repetition on a real Slurm, part of `make soak`: misfortunes at random moments of a job on two nodes."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster
from slurm.devcluster.processes import kill_all
from tests.disturbances import block, fill, small_disk
from tests.jobs.test_resume import result
from tests.launching import steps_logged, wait_until
from tests.slurm.site import Site, state, task_pids, trained_here

pytestmark = [pytest.mark.slurm, pytest.mark.soak]

DRAWS = int(os.environ.get("SOAK_SLURM_DRAWS", "20"))
MISFORTUNES = ("stop", "kill", "kill node", "preempt", "block", "fill")
TASKS = 4
SECONDS = 10.0
"""For so long a disk is full, or takes nothing."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run that nothing disturbs."""
    return result(trained_here(tmp_path_factory.mktemp("calm"), TASKS))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", megabytes=24) as disk:
        yield disk


@pytest.mark.parametrize("draw", range(DRAWS))
def test_whatever_comes_the_job_comes_back_and_ends_with_the_same_bytes(
    draw: int, tidy: DevCluster, calm: dict[str, bytes], disk: Path, tmp_path: Path
) -> None:
    """Nobody types anything after the first command."""
    chance, site = random.Random(draw), Site(disk, tidy)
    hasty = tmp_path / "hasty.toml"
    hasty.write_text('[environment]\nWATCHDOG_S = "5"\n')
    run = site.train("a", TASKS, "--profile", hasty, slow=True)
    for kind in chance.sample(MISFORTUNES, 2):
        # All tasks are watched a moment after they have begun; the first step is seconds away.
        wait_until(lambda: len(task_pids(run)) == TASKS or state(run) == "finished", timeout_s=240)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(2, 6))
        else:
            line = steps_logged(run) + chance.randrange(1, 60)
            wait_until(lambda n=line: steps_logged(run) >= n or state(run) == "finished", timeout_s=240)
        befall(kind, site, run, chance)
    site.finish(run)
    assert result(run) == calm


def befall(kind: str, site: Site, run: Path, chance: random.Random) -> None:
    pids = task_pids(run)
    if kind in ("stop", "kill") and pids:
        os.kill(chance.choice(pids), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        wait_until(lambda: not set(pids) & set(task_pids(run)), timeout_s=240)
    elif kind == "kill node":
        kill_node(site, chance.choice(site.cluster.nodes))
    elif kind == "preempt":
        urgent = site.cluster.submit("sleep 2", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        site.cluster.wait_for_job(urgent, "COMPLETED", timeout_s=120)
    elif kind == "block":
        block(run / "checkpoints", SECONDS)
    elif kind == "fill":
        fill(site.root, SECONDS)


def kill_node(site: Site, name: str) -> None:
    """Ends the node's slurmd and all that it has started, as if the power were gone, and starts it again."""
    kill_all(site.cluster.dir, name)
    try:
        site.cluster.wait_for_node(name, "DOWN", timeout_s=90)
    finally:
        site.cluster.start_node(name)
