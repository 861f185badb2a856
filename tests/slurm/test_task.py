"""What a task of a job finds around itself on a real Slurm, and how often a job starts."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster, wait_for
from slurm.profile import Profile
from slurm.submit import Submission
from slurm.task import Work
from tests.launching import ROOT
from tests.slurm import works
from tests.warm import searched_first

pytestmark = pytest.mark.slurm

# Counts its starts in the file "out", queues itself again when told, and ends for good in its last life.
COUNTING_JOB = """\
echo start ${SLURM_RESTART_COUNT:-0}
trap 'ours requeue; exit 0' USR2
ours() { %s -c "from slurm import task; print(task.$1(), flush=True)"; }
[ "$SLURM_RESTART_COUNT" = %d ] && { ours stay_away; exit 0; }
sleep 100 & wait
"""


def submit(work: Work, folder: Path, cluster: DevCluster, profile: Profile, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    return Submission("test", [work], profile, 2, on_gpus=False, folder=folder, code=ROOT).submit()


def test_tasks_keep_evidence_of_what_goes_wrong(
    tidy: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"host_suffix": "-ib", "interface": "lo"}
    profile = Profile(gpus_per_node=2, cpus_per_gpu=1, environment={"NCCL_DEBUG": "INFO"}, **network)
    job_id = submit(works.write_environment, tmp_path, tidy, profile, monkeypatch)
    tidy.wait_for_job(job_id, "COMPLETED")
    first, second = (json.loads((tmp_path / f"environment-{rank}.json").read_text()) for rank in (0, 1))
    assert first["MASTER_PORT_FILE"] == second["MASTER_PORT_FILE"] == f"{tmp_path}/{job_id}_port_0_0"
    assert [first[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")] == ["lo", "lo"]
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == f"{first['SLURMD_NODENAME']}-ib"
    names = ("NCCL_DEBUG", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    assert [first[name] for name in names] == ["INFO", "2000", "1"]
    files = {first[name] for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")}
    assert files == {f"{tmp_path}/{job_id}_nccl_rank_"}


def test_a_task_that_fails_ends_the_others(tidy: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(works.fail_alone, tmp_path, tidy, Profile(gpus_per_node=2, cpus_per_gpu=1), monkeypatch)
    tidy.wait_for_job(job_id, "FAILED")


def test_a_site_that_waits_a_second_for_late_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tempfile.mkdtemp(prefix="devcluster-")
    with DevCluster.start(folder, nodes=1, accounting=False, node_prefix="w") as hasty:
        with (hasty.dir / "slurm.conf").open("a") as file:
            file.write("WaitTime=1\n")  # srun reads it
        profile = Profile(gpus_per_node=2, cpus_per_gpu=1)
        job_id = submit(works.end_after_the_others, tmp_path, hasty, profile, monkeypatch)
        hasty.wait_for_job(job_id, "COMPLETED", "FAILED")
        assert (tmp_path / "environment-0.json").exists()


@pytest.mark.parametrize("preemptions", [1, 5])
def test_each_preemption_starts_a_job_once(preemptions: int, tidy: DevCluster, tmp_path: Path) -> None:
    """Five: Slurm 24.05 and later hold a job when it has ended so often in the grace time."""
    out = tmp_path / "out"
    script = COUNTING_JOB % (f"PYTHONPATH={searched_first(ROOT)} {sys.executable}", preemptions)
    flags = ("--nodes=2", "--exclusive", "--requeue", "--signal=B:USR2@30", "--open-mode=append", f"--output={out}")
    job_id = tidy.submit(script, *flags)

    def started(times: int) -> Callable[[], bool]:
        return lambda: out.exists() and f"start {times}\n" in out.read_text()

    for times in range(preemptions):
        wait_for(started(times), f"start {times}")
        urgent = tidy.submit("true", "--partition=high", "--nodes=2", "--exclusive")
        tidy.wait_for_job(urgent, "COMPLETED")
    ended = tidy.wait_for_job(job_id, "COMPLETED", "PREEMPTED")
    assert ended["Restarts"] == str(preemptions)
    starts = [line for line in out.read_text().splitlines() if line.startswith("start")]
    assert starts == [f"start {times}" for times in range(preemptions + 1)]
    if preemptions == 1:
        assert ended["JobState"] == "COMPLETED"
