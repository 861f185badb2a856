"""`status`, `logs`, `cancel` and `doctor` on a real Slurm tell the truth, with and without accounting."""

import json
import os
import platform
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.experiments.experiment_json import write
from jobs.experiments.table import EXPERIMENTS
from slurm import queue
from slurm.devcluster import DevCluster
from tests.jobs.test_notify import Server, shows_the_secret
from tests.launching import NO_FIGURES, Finished, finish, start, status, wait_until
from tests.slurm.site import TRAINING, Site, restarted, state, task_pids, tidied

pytestmark = pytest.mark.slurm

ENDLESS = 1_000_000
CPU = ("--device", "cpu", "--slurm.cpus-per-gpu", "1")


@pytest.fixture(scope="module")
def poor_cluster() -> Iterator[DevCluster]:
    """No accounting, no requeueing unless asked for, SIGTERM alone before a preemption, and short arrays."""
    folder = tempfile.mkdtemp(prefix="devcluster-")
    options = {"accounting": False, "job_requeue": False, "user_signal": False, "max_array_size": 10}
    with DevCluster.start(folder, node_prefix="u", **options) as cluster:
        yield cluster


@pytest.fixture
def poor_site(poor_cluster: DevCluster, tmp_path: Path) -> Iterator[Site]:
    with tidied(poor_cluster):
        yield Site(tmp_path, poor_cluster)


def shown(site: Site, run: Path) -> tuple[str, str]:
    """(state, reason) of the run, as scripts see it."""
    listed = site.launch("status", "--json")
    assert listed.code == 0, listed
    (entry,) = (entry for entry in json.loads(listed.out) if entry["run"] == f"1d/{run.name}")
    return entry["state"], entry["reason"]


def looked(site: Site, job_ids: list[str]) -> dict[str, queue.JobState]:
    """What squeue says of the jobs of the test's cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", site.cluster.env["SLURM_CONF"])
        return queue.look(job_ids)


def findings(site: Site, *arguments: object) -> list[dict[str, str]]:
    ended = site.launch("doctor", "--json", "--cluster", "slurm", *arguments)
    found: list[dict[str, str]] = json.loads(ended.out)
    assert ended.code == int(any(finding["level"] == "problem" for finding in found)), ended
    assert all(finding["why"] and finding["cure"] for finding in found if finding["level"] != "ok")
    return found


def level(found: list[dict[str, Any]], words: str) -> str:
    (finding,) = (finding for finding in found if words in finding["what"])
    return str(finding["level"])


def test_a_running_job_is_shown_and_cancelled_with_a_last_checkpoint(site: Site) -> None:
    run = site.train("a", 2, steps=ENDLESS, slow=True)
    assert shown(site, run)[0] in ("queued", "running")
    site.wait_for_step(run, 20)
    assert shown(site, run) == ("running", "")
    assert site.cluster.job(site.job_id(run))["NodeList"] in site.launch("status").out
    site.cluster.restart_controller()
    assert shown(site, run) == ("running", "")
    cancelled = site.launch("cancel", run)
    assert cancelled.code == 0, cancelled
    assert f"runs/1d/a is cancelled; its last checkpoint is of step {status(run)['step']:,} of" in cancelled.out
    assert shown(site, run) == ("cancelled", "")
    assert site.cluster.wait_for_job(site.job_id(run), "CANCELLED")["Restarts"] == "0"
    again = site.launch("cancel", run)
    assert (again.code, again.err) == (2, "error: runs/1d/a is not running: it is cancelled\n")


def test_a_waiting_job_is_shown_and_cancelled(site: Site) -> None:
    site.cluster.wait_for_job(site.cluster.submit("sleep 100", "--nodes=2", "--exclusive"), "RUNNING")
    run = site.train("a", 2)
    wait_until(lambda: shown(site, run) == ("queued", "Resources"))
    following = start("logs", run, "--follow", cwd=site.root, **site.cluster.env)
    assert following.stderr is not None
    assert "is not there yet; the run is queued" in following.stderr.readline()
    cancelled = site.launch("cancel", run)
    assert "is cancelled; it has no checkpoint" in cancelled.out
    assert state(run) == "cancelled"
    site.cluster.wait_for_job(site.job_id(run), "CANCELLED")
    assert finish(following).code == 0


def test_a_job_that_is_queued_again_is_shown_and_cancelled(site: Site) -> None:
    run = site.train("a", 2, steps=ENDLESS, slow=True)
    site.wait_for_step(run, 20)
    site.cluster.submit("sleep 100", "--nodes=2", "--exclusive", "--partition=high")  # keeps it waiting
    wait_until(lambda: shown(site, run)[0] == "requeued")
    assert site.launch("cancel", run).code == 0
    site.cluster.wait_for_job(site.job_id(run), "CANCELLED")
    assert shown(site, run) == ("cancelled", "")


def test_an_array_and_the_job_that_merges_are_cancelled_together(site: Site) -> None:
    run = site.train("a", 1, "--wait", steps=20)
    sampling = ("sample", run, "--num-samples", 40_000_000, "--sampler", "ddpm", "--gpus", 2)
    assert site.launch(*sampling, "--cluster", "slurm", *CPU).code == 0
    job_ids = json.loads((run / "launch.json").read_text())["sample_job_ids"]
    wait_until(lambda: any(job.phase == "running" for job in looked(site, job_ids).values()))
    cancelled = site.launch("cancel", run)
    assert cancelled.code == 0, cancelled
    assert {job.state for job in looked(site, job_ids).values()} == {"CANCELLED"}
    assert state(run) == "finished"
    assert "CANCELLED" in site.launch("status", run).out


def test_logs_follow_a_run_over_its_requeues_and_people_are_told_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    try:
        monkeypatch.setenv("DIFFUSION_WEBHOOK", server.url)
        run = site.train("a", 2, "--tracking.notify", "webhook", slow=True)
        following = start("logs", run, "--follow", cwd=site.root, **site.cluster.env)
        site.wait_for_step(run, 50)
        site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
        wait_until(lambda: restarted(run), timeout_s=240)
        site.finish(run)
        ended = finish(following)
        assert ended.code == 0
        assert f"It is queued again as job {site.job_id(run)}" in ended.out
        assert "Finished " in ended.out
        assert ended.out == (run / "slurm" / f"{site.job_id(run)}_0_log.out").read_text()
        wait_until(lambda: bool(server.received))
        assert [(posted["event"], posted["restarts"]) for posted in server.received] == [("finished", 1)]
        assert shows_the_secret(run, Finished(0, "", "")) == []
    finally:
        server.close()


def answered(site: Site) -> int:
    """How often the controller has been asked about jobs, as it counts itself."""
    counts = re.findall(r"^\s*REQUEST_JOB_\w*INFO\w* .*count:(\d+)", site.cluster.run("sdiag"), re.MULTILINE)
    return sum(map(int, counts))


def due(since: float) -> int:
    """How often one may have asked who waits since then, at the pace at which nothing is known of the job."""
    second = [0.0]
    pace = queue.Pace(clock=lambda: second[0])
    return sum(pace.is_due(None) for second[0] in range(int(time.monotonic() - since) + 1))


def test_waiting_for_a_run_asks_slurm_seldom_and_sees_its_end(site: Site, tmp_path: Path) -> None:
    asked, squeue = tmp_path / "asked", shutil.which("squeue")
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "squeue").write_text(f'#!/bin/sh\necho x >> {asked}\nexec {squeue} "$@"\n')
    (folder / "squeue").chmod(0o755)
    environment = {**site.cluster.env, **NO_FIGURES, "PATH": f"{folder}:{os.environ['PATH']}"}

    def questions() -> int:
        return asked.read_text().count("x") if asked.exists() else 0

    blocking = site.cluster.submit("sleep 300", "--nodes=2", "--exclusive")
    site.cluster.wait_for_job(blocking, "RUNNING")
    began, before = time.monotonic(), answered(site)
    waiting = start(*TRAINING, "--train.steps", 20, "--gpus", 1, "--name", "a", "--wait", cwd=tmp_path, **environment)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: state(run) == "queued" and questions() >= 4, timeout_s=120)
    assert answered(site) - before <= questions() <= due(began)  # after 0, 2, 6 and 14 s; no other tool asks more
    freed = time.monotonic()
    site.cluster.run("scancel", blocking)
    ended = finish(waiting)
    assert ended.code == 0, ended
    assert state(run) == "finished"
    assert questions() <= due(began) + due(freed)  # none while it runs, and at the end the pauses are short again


@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_is_killed_without_a_word(accounting: bool, request: pytest.FixtureRequest) -> None:
    site: Site = request.getfixturevalue("site" if accounting else "poor_site")
    run = site.train("a", 1, "--retries", 0, steps=ENDLESS)
    site.wait_for_step(run, 100)
    (pid,) = task_pids(run)
    os.kill(pid, signal.SIGKILL)  # as the kernel does where memory runs out
    site.cluster.wait_for_job(site.job_id(run), "FAILED")
    assert shown(site, run) == ("failed", "task 0 was ended: Killed")
    # As where nothing outlives the task, either.
    said = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**said, "state": "running"}))
    assert shown(site, run) == ("failed", "killed by SIGKILL")
    assert site.launch("cancel", run).code == 2
    # The same long after, when Slurm's controller has forgotten the job.
    forgotten = {**json.loads((run / "launch.json").read_text()), "job_ids": ["1"]}
    (run / "launch.json").write_text(json.dumps(forgotten))
    assert shown(site, run) == ("failed", "died without a word")


def test_the_accounting_remembers_what_the_controller_has_forgotten(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", site.cluster.env["SLURM_CONF"])
    killed = site.cluster.submit("srun bash -c 'kill -9 $$'")
    array = site.cluster.submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    late = site.cluster.submit("sleep 100")
    site.cluster.wait_for_job(killed, "FAILED")
    site.cluster.run("scancel", late)
    site.cluster.wait_for_job(late, "CANCELLED")
    expected = {killed: "FAILED", f"{array}_0": "COMPLETED", f"{array}_1": "FAILED", late: "CANCELLED"}
    asked = {killed, array, late}
    wait_until(lambda: {job: found.state for job, found in queue._recall(asked).items()} == expected)
    assert queue._recall(asked)[killed].signal == queue.look(asked)[killed].signal == "SIGKILL"
    assert {job: found.state for job, found in queue.look(asked).items()} == expected


def test_a_node_that_is_gone(site: Site) -> None:
    run = site.train("a", 1, steps=ENDLESS, slow=True)
    site.wait_for_step(run, 20)
    node = site.cluster.job(site.job_id(run))["NodeList"]
    site.cluster.kill_node(node)
    try:
        seen = {shown(site, run)[0]}
        wait_until(lambda: seen.add(shown(site, run)[0]) or status(run)["restarts"] == 1, timeout_s=120)
        assert {"requeued"} <= seen <= {"running", "requeued"}
        cancelled = site.launch("cancel", run)
        assert cancelled.code == 0
        assert shown(site, run) == ("cancelled", ""), (cancelled, status(run), site.log(run))
    finally:
        site.cluster.start_node(node)


def test_two_hundred_runs_that_died_without_a_word_are_all_seen(site: Site) -> None:
    for i in range(200):
        run = site.root / "runs" / "1d" / f"run-{i}"
        run.mkdir(parents=True)
        (run / "experiment.json").write_text(write("1d", EXPERIMENTS["1d"].preset))
        (run / "launch.json").write_text(json.dumps({"job_ids": [str(i)], "host": platform.node()}))
        died = {"state": "running", "step": i, "total": 200, "updated": "2026-01-01T00:00:00.000+00:00"}
        (run / "status.json").write_text(json.dumps(died))
    listed = site.launch("status")
    assert listed.out.count("failed (died without a word)") == 200


def test_the_doctor_on_a_cluster_in_good_order(site: Site) -> None:
    found = findings(site, *CPU, "--slurm.gpus-per-node", 4)
    assert [finding for finding in found if finding["level"] == "problem"] == []
    assert level(found, "accounting: sacct answers") == "ok"
    assert level(found, "Slurm would take a job") == "ok"


def test_the_doctor_on_a_cluster_with_faults(poor_site: Site) -> None:
    found = findings(poor_site, *CPU)
    assert level(found, "no accounting") == "warning"
    assert level(found, "JobRequeue=0") == "ok"
    assert level(found, "SIGTERM alone") == "warning"
    assert level(found, "MaxArraySize=10") == "ok"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--slurm.partition", "nonsense"), "partition nonsense does not exist"),
        (("--gpus", "4", "--slurm.gpus-per-node", "2", "--slurm.cpus-per-gpu", "8"), "CPUs of a node in low: 4"),
        (("--gpus", "12", "--slurm.gpus-per-node", "4", "--slurm.cpus-per-gpu", "1"), "nodes of low that are up: 2"),
        (("--slurm.mem-gb", "980"), "GB of memory of a node in low: 976, asked for 980"),  # 1 GB is 1,024 MB
        (("--slurm.account", "a", "--slurm.constraint", "a100"), "Slurm refuses the job"),
    ],
)
def test_the_doctor_on_a_profile_with_faults(flags: tuple[str, ...], words: str, poor_site: Site) -> None:
    assert level(findings(poor_site, *CPU, *flags), words) == "problem"


def test_the_doctor_submits_a_job_to_both_nodes(site: Site) -> None:
    flags = (*CPU, "--submit", "--gpus", 2, "--slurm.gpus-per-node", 1)
    found = findings(site, *flags)
    assert level(found, "a job of 2 tasks ran on n1, n2") == "ok"
    assert level(found, "the tasks reach each other") == "ok"
    assert level(found, "all others see") == "ok"
    assert list((site.root / "runs").iterdir()) == []


def test_the_doctor_submits_a_job_that_finds_no_gpus(site: Site) -> None:
    """The dev cluster's GPUs are pretended: Slurm gives them, torch cannot use them."""
    flags = ("--submit", "--slurm.gpus-per-node", 4, "--slurm.cpus-per-gpu", 1, "--device", "cuda")
    found = findings(site, *flags)
    assert level(found, "task 0 on") == "problem"
