"""Training on a real Slurm goes on after whatever the cluster does to it, and the result is the same bytes."""

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster
from tests.jobs.test_resume import result
from tests.launching import Finished, launch, status, steps_logged, wait_until

pytestmark = pytest.mark.slurm

STEPS = 2500
ENDLESS = 200_000
TRAINING = (
    *("train", "1d", "--model.dim", "16", "--train.batch-size", "64", "--train.log-every", "1"),
    *("--train.checkpoint-every", "300", "--device", "cpu", "--cluster", "slurm", "--slurm.cpus-per-gpu", "1"),
    *("--slurm.time-min", "10", "--slurm.signal-delay-s", "30", "--slurm.gpus-per-node", "2"),
)
SHAPES = {"1x2": 2, "2x2": 4}


class Site:
    """A folder and a cluster to submit from."""

    def __init__(self, root: Path, cluster: DevCluster) -> None:
        self.root, self.cluster = root, cluster

    def launch(self, *arguments: object) -> Finished:
        return launch(*arguments, cwd=self.root, **self.cluster.env)

    def train(self, name: str, gpus: int, *more: object, steps: int = STEPS) -> Path:
        """Submits a training and returns its run folder."""
        submitted = self.launch(*TRAINING, "--train.steps", steps, "--gpus", gpus, "--name", name, *more)
        assert submitted.code == 0, submitted
        assert "Submitted" in submitted.out
        return self.root / "runs" / "1d" / name

    def job_id(self, run: Path) -> str:
        job_ids: list[str] = json.loads((run / "launch.json").read_text())["job_ids"]
        return job_ids[-1]

    def log(self, run: Path) -> str:
        return "".join(path.read_text() for path in sorted((run / "slurm").glob("*_log.out")))

    def wait_for_step(self, run: Path, step: int) -> None:
        wait_until(lambda: steps_logged(run) >= step or state(run) == "failed", timeout_s=120)
        assert state(run) != "failed", self.log(run)

    def wait_for_state(self, run: Path, *states: str, timeout_s: float = 240) -> None:
        wait_until(lambda: state(run) in states, timeout_s=timeout_s)

    def finish(self, run: Path) -> None:
        wait_until(lambda: state(run) in ("finished", "failed", "cancelled"), timeout_s=300)
        assert state(run) == "finished", self.log(run)
        self.cluster.wait_for_job(self.job_id(run), "COMPLETED")


def state(run: Path) -> str | None:
    return status(run)["state"] if (run / "status.json").exists() else None


@pytest.fixture
def site(cluster: DevCluster, tmp_path: Path) -> Iterator[Site]:
    """The shared cluster, from a folder of the test's own; jobs end with the test."""
    yield Site(tmp_path, cluster)
    cluster.run("scancel", "--user", "root", "--full")
    for name in cluster.nodes:
        cluster.wait_for_node(name, "IDLE")


@pytest.fixture(scope="module")
def undisturbed(cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """The result of a run of so many tasks that nothing disturbs."""
    calm = Site(tmp_path_factory.mktemp("undisturbed"), cluster)

    @cache
    def reference(gpus: int) -> dict[str, bytes]:
        run = calm.train(f"calm-{gpus}", gpus)
        calm.finish(run)
        return result(run)

    return reference


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
    calm = site.train("calm", gpus, "--train.checkpoint-every", len(lines), steps=ENDLESS)
    folder = f"checkpoints/step-{len(lines):08d}"
    wait_until(lambda: (calm / folder).is_dir(), timeout_s=300)
    for path in (run / folder).iterdir():
        assert path.read_bytes() == (calm / folder / path.name).read_bytes(), path.name


def restarts(run: Path) -> int:
    return int(status(run).get("restarts", 0)) if (run / "status.json").exists() else 0


def restarted(run: Path) -> bool:
    return restarts(run) >= 1 and state(run) in ("running", "finished")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_user_signal_saves_and_queues_again(
    shape: str, site: Site, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(SHAPES[shape])
    run = site.train("a", SHAPES[shape])
    site.wait_for_step(run, 700)
    site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
    wait_until(lambda: restarted(run), timeout_s=60)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_preemption_by_the_high_partition(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(4)
    run = site.train("a", 4)
    site.wait_for_step(run, 500)
    urgent = site.cluster.submit("sleep 2", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    site.cluster.wait_for_job(urgent, "COMPLETED", timeout_s=90)
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
        run = site.train("a", 2)
        site.wait_for_step(run, 500)
        urgent = quiet.submit("sleep 2", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        quiet.wait_for_job(urgent, "COMPLETED", timeout_s=90)
        site.finish(run)
        assert status(run)["restarts"] == 1
        assert_equal(run, expected)


def test_scontrol_requeue(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2)
    site.wait_for_step(run, 500)
    site.cluster.run("scontrol", "requeue", site.job_id(run))
    wait_until(lambda: restarted(run), timeout_s=60)
    site.finish(run)
    assert_equal(run, expected)


def test_a_node_that_dies_while_its_processes_live_on(site: Site) -> None:
    run = site.train("a", 2, steps=ENDLESS)
    site.wait_for_step(run, 500)
    node = site.cluster.job(site.job_id(run))["NodeList"]
    site.cluster.kill_node(node)
    try:
        wait_until(lambda: restarts(run) == 1 and state(run) == "running", timeout_s=120)
        site.wait_for_step(run, steps_logged(run) + 500)
        interrupt(site, run)
    finally:
        site.cluster.start_node(node)
    assert_as_if_nothing_had_happened(site, run, 2)


def test_a_restarted_controller_is_not_noticed(site: Site, undisturbed: Callable[[int], dict[str, bytes]]) -> None:
    expected = undisturbed(2)
    run = site.train("a", 2)
    site.wait_for_step(run, 300)
    site.cluster.restart_controller()
    site.finish(run)
    assert status(run)["restarts"] == 0
    assert_equal(run, expected)


def test_a_run_longer_than_the_time_limit_goes_on_over_requeues(site: Site) -> None:
    limit = ("--slurm.time-min", 1, "--slurm.signal-delay-s", 20)
    run = site.train("a", 2, *limit, steps=ENDLESS)
    wait_until(lambda: restarts(run) >= 2, timeout_s=300)
    progress = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    starts = [line["step"] for line in progress if line["event"] == "start"]
    # Slurm may send the signal up to a minute early, so one life may end before its first step; two in a row may not.
    assert starts == sorted(starts)
    assert starts[-1] > 0
    refused = site.launch("resume", run)
    assert refused.code == 2
    assert "on Slurm already" in refused.err
    site.wait_for_step(run, starts[-1] + 100)
    interrupt(site, run)
    assert_as_if_nothing_had_happened(site, run, 2)


def test_a_job_that_gets_nowhere_stops_and_says_so(site: Site) -> None:
    """The copy of the code that runs is told to make room before its first step, each time."""
    run = site.train("a", 2, steps=60_000)
    code = run / "code" / "jobs" / "train.py"
    marker = "    experiment, config = run.read_experiment()\n"
    text = code.read_text()
    assert marker in text
    code.write_text(
        text.replace(marker, "    import os, signal\n    os.kill(os.getpid(), signal.SIGUSR2)\n" + marker, 1)
    )
    site.wait_for_state(run, "failed", timeout_s=300)
    assert "no progress between two requeues" in status(run)["traceback"]
    assert restarts(run) == 1
    site.cluster.wait_for_job(site.job_id(run), "FAILED")


def test_scancel_ends_a_run_for_good_with_a_last_checkpoint(site: Site) -> None:
    run = site.train("a", 2, steps=100_000)
    site.wait_for_step(run, 400)
    site.cluster.run("scancel", site.job_id(run))
    site.wait_for_state(run, "cancelled")
    site.cluster.wait_for_job(site.job_id(run), "CANCELLED")
    assert (run / "checkpoints" / f"step-{steps_logged(run):08d}").is_dir()
    assert site.cluster.job(site.job_id(run))["Restarts"] == "0"


def test_a_crash_of_one_rank_ends_the_job_with_its_traceback_and_does_not_loop(site: Site) -> None:
    run = site.train("a", 4, steps=100_000)
    site.wait_for_step(run, 100)
    pids = task_pids(run)
    assert len(pids) == 4
    os.kill(pids[2], signal.SIGKILL)
    site.wait_for_state(run, "failed", timeout_s=60)
    job = site.cluster.wait_for_job(site.job_id(run), "FAILED", timeout_s=60)
    assert job["Restarts"] == "0"
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])


def test_a_failing_rank_puts_its_own_traceback_into_the_status(site: Site) -> None:
    """The snapshot of the code is what runs: broken there for rank 1 alone, it fails there alone."""
    run = site.train("a", 2, "--slurm.partition", "low", steps=100_000)
    code = run / "code" / "jobs" / "training.py"
    breakage = "        import os\n        assert os.environ['RANK'] != '1' or self.step < 50, 'broken on purpose'\n"
    marker = '        """One optimizer update on the next global batch."""\n'
    text = code.read_text()
    assert marker in text
    code.write_text(text.replace(marker, marker + breakage))
    site.wait_for_state(run, "failed", timeout_s=120)
    assert status(run)["failed_rank"] == 1
    assert "broken on purpose" in status(run)["traceback"]
    site.cluster.wait_for_job(site.job_id(run), "FAILED", timeout_s=60)


def test_sampling_through_slurm_writes_the_same_bytes_as_here(site: Site) -> None:
    run = site.train("a", 2, "--wait", steps=50)
    assert state(run) == "finished"
    command = ("sample", run, "--num-samples", "300000", "--sampler", "dpm++", "--steps", "5", "--device", "cpu")
    here = site.launch(*command, "--name", "here", "--cluster", "local")
    assert here.code == 0, here
    slurm = ("--cluster", "slurm", "--gpus", 2, "--slurm.cpus-per-gpu", 1, "--wait")
    there = site.launch(*command, "--name", "there", *slurm)
    assert there.code == 0, there
    for path in sorted((run / "samples" / "here").iterdir()):
        assert path.read_bytes() == (run / "samples" / "there" / path.name).read_bytes(), path.name


def test_a_dry_run_shows_the_script_that_would_be_submitted_and_writes_nothing(site: Site) -> None:
    arguments = (*TRAINING, "--train.steps", 50, "--gpus", 4, "--name", "a", "--slurm.partition", "low")
    shown = site.launch(*arguments, "--dry-run")
    assert shown.code == 0
    assert list(site.root.iterdir()) == []
    script = shown.out[shown.out.index("#!/bin/bash") :].strip()
    run = site.train("a", 4, "--slurm.partition", "low", steps=50)
    (submitted,) = (run / "slurm").glob("*_submission.sh")
    assert submitted.read_text().strip() == script
    site.finish(run)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--slurm.partition", "nonsense"), "nvalid partition"),
        (("--gpus", 8), "More processors requested than permitted|node configuration is not available"),
        (("--gpus", 3, "--train.batch-size", 66), "--gpus must be a multiple of gpus_per_node=2"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words_and_nothing_is_written(
    flags: tuple[object, ...], words: str, site: Site
) -> None:
    refused = site.launch(*TRAINING, "--train.steps", 50, "--gpus", 2, "--name", "a", *flags)
    assert refused.code == 2
    assert re.search(words, refused.err), refused.err
    assert "Traceback" not in refused.err
    assert list(site.root.iterdir()) == []


def test_an_salloc_runs_here_and_a_missing_controller_is_said(site: Site, tmp_path: Path) -> None:
    inside = launch("train", "1d", "--dry-run", "--device", "cpu", cwd=tmp_path, SLURM_JOB_ID="1", **site.cluster.env)
    assert "Would run on this machine" in inside.out
    missing = launch("train", "1d", "--cluster", "slurm", cwd=tmp_path, SLURM_CONF="/nowhere/slurm.conf")
    assert missing.code == 2
    assert "scontrol ping" in missing.err


def task_pids(run: Path) -> list[int]:
    """The processes of the job's tasks, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(e.split(b"=", 1) for e in (folder / "environ").read_bytes().split(b"\0") if b"=" in e)
        except OSError:
            continue
        if (
            b"submitit.core._submit" in command
            and str(run / "slurm").encode() in command
            and b"SLURM_PROCID" in environment
        ):
            if command[0].endswith(b"srun"):
                continue
            found[int(environment[b"SLURM_PROCID"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


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
    run = site.train("a", 2, "--profile", profile)
    site.wait_for_step(run, 500)
    site.cluster.run("scancel", "--signal=USR2", site.job_id(run))
    wait_until(lambda: len(json.loads((run / "launch.json").read_text())["job_ids"]) == 2)
    site.finish(run)
    assert status(run)["restarts"] == 1
    assert_equal(run, expected)


def test_submitting_does_not_import_torch(site: Site) -> None:
    arguments = (*TRAINING, "--train.steps", 20, "--gpus", 1, "--name", "a")
    submitted = launch(*arguments, cwd=site.root, PYTHONPROFILEIMPORTTIME="1", **site.cluster.env)
    assert submitted.code == 0
    imported = {
        line.rpartition("|")[2].strip() for line in submitted.err.splitlines() if line.startswith("import time:")
    }
    assert "submitit" in imported
    assert "torch" not in imported
