"""Training on a real Slurm goes on after whatever the cluster does to it, and the result is the same bytes."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from jobs.storage import faults
from jobs.storage.records import read_jsonl
from jobs.storage.run_folder import RunFolder
from slurm.devcluster import DevCluster, wait_for
from tests.jobs.test_resume import result
from tests.launching import status, steps_logged, wait_until
from tests.slurm.site import (
    START,
    STEPS,
    UPDATE,
    Site,
    change,
    checkpoint_made_here,
    made_once,
    restarted,
    restarts,
    slow_down,
    state,
    task_pids,
    trained_here,
)

pytestmark = pytest.mark.slurm

ENDLESS = 200_000
DISTURBED = 50
"""The step at which most tests disturb a run: some after a save."""
SHAPES = {"1x2": 2, "2x2": 4}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """The result of a run of so many processes that nothing disturbs, without Slurm."""

    @cache
    def of(gpus: int) -> dict[str, bytes]:
        made = made_once(tmp_path_factory, f"undisturbed-{gpus}", lambda root: trained_here(root, gpus))
        (run,) = (made / "runs" / "1d").iterdir()
        return result(run)

    return of


def assert_equal(run: Path, expected: dict[str, bytes]) -> None:
    found = result(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def interrupt(site: Site, run: Path) -> None:
    """Ends the run with a last checkpoint."""
    site.cluster.run("scancel", "--signal=INT", site.job_id(run))
    site.wait_for_state(run, "interrupted")


def assert_as_if_nothing_had_happened(site: Site, run: Path, gpus: int) -> None:
    """An interrupted endless run logged each step once, and its weights are those of a run that nothing disturbed."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    calm = checkpoint_made_here(site.root, gpus, len(lines), ENDLESS)
    for path in (run / "checkpoints" / calm.name).iterdir():
        assert path.read_bytes() == (calm / path.name).read_bytes(), path.name


def test_a_run_longer_than_the_time_limit_goes_on_over_requeues(site: Site) -> None:
    run = site.train("a", 2, steps=ENDLESS, slow=True)
    job_id = site.job_id(run)
    for life in (1, 2):
        site.wait_for_step(run, steps_logged(run) + 20)
        # Slurm's shortest limit is a minute, in which a busy machine may come to no step. So the limit comes when some
        # are done. Slurm looks every half minute, and sends the signal (--slurm.signal-delay-s) up to a minute before
        # the end: at one of its next two looks, half a minute before the end at the latest.
        site.cluster.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+62")
        wait_for(lambda n=life: int(site.cluster.job(job_id)["Restarts"]) >= n, f"restart {life}", timeout_s=150)
        site.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")
        wait_until(lambda n=life: restarts(run) >= n and state(run) == "running", timeout_s=120)
    site.wait_for_step(run, steps_logged(run) + 20)
    starts = [line["step"] for line in read_jsonl(run / "timing.jsonl") if line["event"] == "start"]
    assert starts == sorted(starts)
    assert len(set(starts)) >= 3  # lives that have begun where another one had come to
    refused = site.launch("resume", run)
    assert refused.code == 2
    assert "on Slurm already" in refused.err
    interrupt(site, run)
    assert_as_if_nothing_had_happened(site, run, 2)


def test_a_node_that_dies_while_its_processes_live_on(site: Site) -> None:
    run = site.train("a", 2, steps=ENDLESS, slow=True)
    site.wait_for_step(run, 20)
    node = site.cluster.job(site.job_id(run))["NodeList"]
    site.cluster.kill_node(node)
    try:
        wait_until(lambda: restarts(run) == 1 and state(run) == "running", timeout_s=120)
        site.wait_for_step(run, steps_logged(run) + 20)
        interrupt(site, run)
    finally:
        site.cluster.start_node(node)
    assert_as_if_nothing_had_happened(site, run, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_user_signal_saves_and_queues_again(
    shape: str, site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(SHAPES[shape])
    run = site.train("a", SHAPES[shape], slow=True)
    site.wait_for_step(run, DISTURBED)
    site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
    wait_until(lambda: restarted(run), timeout_s=240)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_tasks_without_slurms_tools_are_queued_again_by_their_script(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    """As in a container, where there is neither scontrol nor sbatch."""
    expected = undisturbed(2)
    run = site.train("a", 2, "--slurm.python", f"env PATH=/nowhere {sys.executable}", slow=True)
    site.wait_for_step(run, DISTURBED)
    site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
    wait_until(lambda: restarted(run), timeout_s=240)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert list((run / "slurm").glob("*_requeue")) == []
    assert_equal(run, expected)


def test_preemption_by_the_high_partition(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2, slow=True)
    site.wait_for_step(run, DISTURBED)
    urgent = site.cluster.submit("sleep 2", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.cluster.wait_for_job(urgent, "COMPLETED", timeout_s=240)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_preemption_where_the_cluster_sends_sigterm_alone(
    undisturbed: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = undisturbed(2)
    folder = tempfile.mkdtemp(prefix="devcluster-")
    with DevCluster.start(folder, accounting=False, user_signal=False, job_requeue=False, node_prefix="t") as quiet:
        site = Site(tmp_path, quiet)
        run = site.train("a", 2, slow=True)
        site.wait_for_step(run, DISTURBED)
        urgent = quiet.submit("sleep 2", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        quiet.wait_for_job(urgent, "COMPLETED", timeout_s=240)
        site.finish(run)
        assert status(run)["restarts"] == 1
        assert_equal(run, expected)


def test_scontrol_requeue(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2, slow=True)
    site.wait_for_step(run, DISTURBED)
    site.cluster.run("scontrol", "requeue", site.job_id(run))
    wait_until(lambda: restarted(run), timeout_s=240)
    site.finish(run)
    assert_equal(run, expected)


def test_a_run_that_is_killed_goes_on_with_other_numbers_of_tasks(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(4)
    run = site.train("a", 4, "--retries", 0, slow=True)
    for tasks, step, then in ((4, DISTURBED, 1), (1, 90, 2)):
        site.wait_for_step(run, step)
        pids = task_pids(run)
        assert len(pids) == tasks
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        site.cluster.wait_for_job(site.job_id(run), "FAILED", timeout_s=240)
        site.wait_for_state(run, "failed")
        where = ("--device", "cpu", "--slurm.cpus-per-gpu", 1, "--slurm.gpus-per-node", 2, "--slurm.time-min", 10)
        resumed = site.launch("resume", run, "--cluster", "slurm", *where, "--gpus", then, "--retries", 0)
        assert resumed.code == 0, resumed
        # Today's code is not the slow one, so the job has a copy of its own; the last job finds that one.
        if then == 1:
            (copy,) = run.glob("code-*")
            slow_down(run, copy)
    site.finish(run)
    starts = [line for line in read_jsonl(run / "timing.jsonl") if line["event"] == "start"]
    assert [line["processes"] for line in starts] == [4, 1, 2]
    assert all(line["step"] < line["reached"] for line in starts[1:])  # killed, not stopped
    assert "bytes may differ" not in site.log(run)
    assert_equal(run, expected)


def test_a_restarted_controller_is_not_noticed(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2, slow=True)
    site.wait_for_step(run, 20)
    site.cluster.restart_controller()
    site.finish(run)
    assert status(run)["restarts"] == 0
    assert_equal(run, expected)


def test_a_job_that_fails_while_the_controller_is_away_comes_back_when_it_is_back(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2, slow=True)
    site.wait_for_step(run, DISTURBED)
    with site.cluster.without_controller():
        os.kill(task_pids(run)[1], signal.SIGKILL)
        wait_until(lambda: "asking again" in site.log(run), timeout_s=240)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


TOLD = "    import os, signal\n    {condition}os.kill(os.getpid(), signal.SIGUSR2)\n"


def test_a_job_that_is_preempted_before_its_first_step_comes_back_as_often_as_it_takes(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2)
    told = TOLD.format(condition="if int(os.environ.get('SLURM_RESTART_COUNT', 0)) < 3: ")
    change(run / "code" / "jobs" / "train" / "loop.py", START, told + START)
    site.finish(run)
    assert restarts(run) == 3
    assert_equal(run, expected)


def test_a_job_that_gets_nowhere_in_two_time_limits_stops_and_says_so(site: Site) -> None:
    """With a time limit of a minute, Slurm may tell it to save at once: here it is told before its first step."""
    run = site.train("a", 2, "--slurm.time-min", 1, steps=60_000)
    change(run / "code" / "jobs" / "train" / "loop.py", START, TOLD.format(condition="") + START)
    site.wait_for_state(run, "failed", timeout_s=300)
    assert "no progress in two whole time limits" in status(run)["traceback"]
    assert restarts(run) == 1
    site.cluster.wait_for_job(site.job_id(run), "FAILED")


def test_scancel_ends_a_run_for_good_with_a_last_checkpoint(site: Site) -> None:
    run = site.train("a", 2, steps=100_000)
    site.wait_for_step(run, DISTURBED)
    site.cluster.run("scancel", site.job_id(run))
    site.wait_for_state(run, "cancelled")
    site.cluster.wait_for_job(site.job_id(run), "CANCELLED")
    assert (run / "checkpoints" / f"step-{steps_logged(run):08d}").is_dir()
    assert site.cluster.job(site.job_id(run))["Restarts"] == "0"


def test_a_job_whose_task_is_killed_is_queued_again(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2, slow=True)
    site.wait_for_step(run, DISTURBED)
    node = site.cluster.job(site.job_id(run))["NodeList"]
    pids = task_pids(run)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])
    site.finish(run)
    (fault,) = faults.read(RunFolder(run))
    assert (fault.cause, fault.node, fault.again) == ("task 1 was ended: Killed", node, True)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_a_job_whose_task_dies_after_the_last_save_has_ended_well(site: Site) -> None:
    run = site.train("a", 2)
    last = f"run.checkpoints / 'step-{STEPS:08d}'"
    dies = f"        if world.rank == 1:\n            import os\n            while not ({last}).is_dir():\n"
    dies += "                time.sleep(0.1)\n            os.kill(os.getpid(), 9)\n"
    end = '        watchdog.phase("the end", END)\n'
    change(run / "code" / "jobs" / "train" / "loop.py", end, dies + end)
    site.finish(run)
    assert "is finished all the same: " in site.log(run)
    assert (restarts(run), site.cluster.job(site.job_id(run))["Restarts"]) == (0, "0")
    assert faults.read(RunFolder(run)) == []


def test_a_node_that_dies_with_all_its_processes(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    """The survivor fails, because it loses the other: the job would be over before Slurm knows why."""
    expected = undisturbed(2)
    run = site.train("a", 2, "--slurm.gpus-per-node", 1, slow=True)
    site.wait_for_step(run, DISTURBED)
    second = site.cluster.nodes[1]
    survivor, lost = task_pids(run)
    site.cluster.kill_node(second)
    try:
        parent = int(Path(f"/proc/{lost}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)  # slurmstepd
        os.kill(lost, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{survivor}").exists(), timeout_s=120)
    finally:
        site.cluster.start_node(second)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_a_job_whose_task_hangs_is_noticed_and_queued_again(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = undisturbed(2)
    profile = tmp_path / "hasty.toml"
    profile.write_text('[environment]\nWATCHDOG_S = "5"\n')
    run = site.train("a", 2, "--profile", profile, slow=True)
    site.wait_for_step(run, DISTURBED)
    os.kill(task_pids(run)[1], signal.SIGSTOP)
    site.finish(run)
    (fault,) = faults.read(RunFolder(run))
    assert fault.cause.startswith("hung: process 1 on n")
    assert fault.cause.endswith(", stopped")
    assert fault.cause.split()[4].rstrip(":") == fault.node
    assert len(list((run / str(fault.hang)).iterdir())) == 2
    assert_equal(run, expected)


def test_a_node_on_which_a_run_dies_twice_without_progress_is_left_out(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(2)
    bad, good = site.cluster.nodes
    run = site.train("a", 2)
    dies = f"        import os\n        if self.step == 30 and os.environ['SLURMD_NODENAME'] == '{bad}':\n"
    change(run / "code" / "jobs" / "train" / "state.py", UPDATE, f"{UPDATE}{dies}            os.kill(os.getpid(), 9)\n")
    site.finish(run)
    found = faults.read(RunFolder(run))
    assert [(fault.node, list(fault.left_out)) for fault in found] == [(bad, []), (bad, [bad])]
    job = site.cluster.job(site.job_id(run))
    assert (job["ExcNodeList"], job["NodeList"]) == (bad, good)
    assert_equal(run, expected)


def test_a_rank_that_fails_twice_at_the_same_step_puts_its_own_tracebacks_into_the_status(site: Site) -> None:
    """The snapshot of the code is what runs: broken there for rank 1 alone, it fails there alone, and so once more."""
    run = site.train("a", 2, "--slurm.partition", "low", steps=100_000)
    breakage = "        import os\n        assert os.environ['RANK'] != '1' or self.step < 30, 'broken on purpose'\n"
    change(run / "code" / "jobs" / "train" / "state.py", UPDATE, UPDATE + breakage)
    site.wait_for_state(run, "failed", timeout_s=120)
    assert status(run)["failed_rank"] == 1
    assert status(run)["traceback"].count("AssertionError: broken on purpose") == 2
    assert restarts(run) == 1
    site.cluster.wait_for_job(site.job_id(run), "FAILED", timeout_s=240)


def test_a_node_without_scontrol_submits_the_job_anew(
    site: Site, undisturbed: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = undisturbed(2)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sbatch", "srun", "sh", "bash", "git"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    profile = tmp_path / "site.toml"
    profile.write_text(f'[environment]\nPATH = "{tools}"\n')
    run = site.train("a", 2, "--profile", profile, slow=True)
    site.wait_for_step(run, DISTURBED)
    site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
    wait_until(lambda: len(json.loads((run / "launch.json").read_text())["job_ids"]) == 2, timeout_s=240)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)
