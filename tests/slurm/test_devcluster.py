"""The dev cluster does to jobs what real clusters do, and leaves nothing on the machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from slurm.devcluster import APT_PACKAGES, DevCluster, Options, machine, wait_for
from slurm.devcluster.__main__ import parser
from slurm.devcluster.processes import cluster_processes

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
Submit = Callable[..., str]

# Notes each signal in the file "signals" of the job's folder, and ends at the first.
NOTING_TASK = """\
note() { echo $1 $SLURM_PROCID >> signals; exit 0; }
trap 'note USR2' USR2
trap 'note TERM' TERM
touch ready-$SLURM_PROCID
while true; do sleep 0.1; done
"""


@pytest.fixture
def dir() -> Iterator[Path]:
    """A short path (sockets lie below it) where a cluster may live; whatever the test left there is removed."""
    path = Path(tempfile.mkdtemp(prefix="devcluster-"))
    yield path
    DevCluster(path, Options()).stop()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def submit(cluster: DevCluster, tmp_path: Path) -> Iterator[Submit]:
    """Submits to the shared cluster, from the test's own folder; jobs end with the test."""
    ids = []

    def submit_here(script: str, *flags: str) -> str:
        ids.append(cluster.submit(script, f"--chdir={tmp_path}", "--output=out", "--open-mode=append", *flags))
        return ids[-1]

    yield submit_here
    for job_id in ids:
        cluster.run("scancel", job_id)
    for name in cluster.nodes:
        cluster.wait_for_node(name, "IDLE")


def devcluster(
    *arguments: str | Path, prefix: Sequence[str] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "slurm.devcluster", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


def wait_for_text(text: str, file: Path) -> None:
    wait_for(lambda: file.exists() and text in file.read_text(), f"{text!r} in {file}")


def assert_nothing_left(dir: Path) -> None:
    assert cluster_processes(dir) == []
    assert not dir.exists()
    assert str(dir) not in Path("/etc/hosts").read_text()


def test_one_task_per_gpu_on_two_nodes(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    task = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'"
    job_id = submit(task, "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4")
    cluster.wait_for_job(job_id, "COMPLETED")
    expected = {f"{node} {rank} 0,1,2,3" for node in ("n1", "n2") for rank in range(4)}
    assert set((tmp_path / "out").read_text().splitlines()) == expected


def test_jobs_on_one_node_get_different_gpus(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES; while [ $(wc -l < out) -lt 2 ]; do sleep 0.1; done"
    for job_id in [submit(script, "--nodelist=n1", "--gpus-per-node=2") for _ in range(2)]:
        cluster.wait_for_job(job_id, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().split()) == ["0,1", "2,3"]


def test_requeued_job_is_back_within_seconds(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    job_id = submit("echo restart ${SLURM_RESTART_COUNT:-0}; [ $SLURM_RESTART_COUNT ] || sleep 100")
    wait_for_text("restart 0", tmp_path / "out")
    cluster.run("scontrol", "requeue", job_id)
    job = cluster.wait_for_job(job_id, "COMPLETED", timeout_s=100)  # by default it would take two minutes
    assert job["Restarts"] == "1"
    assert "\nrestart 1\n" in (tmp_path / "out").read_text()


def test_preemption_sends_the_jobs_own_signal(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "task").write_text(NOTING_TASK)
    flags = ("--nodes=2", "--ntasks-per-node=1", "--exclusive")
    submit("srun bash task", *flags, "--signal=USR2@30")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both tasks")
    urgent = submit("true", *flags, "--partition=high")
    cluster.wait_for_job(urgent, "COMPLETED")
    assert sorted((tmp_path / "signals").read_text().splitlines()) == ["USR2 0", "USR2 1"]


def test_accounting_tells_how_jobs_ended(cluster: DevCluster, submit: Submit) -> None:
    ids = {state: submit(script) for state, script in {"COMPLETED": "true", "FAILED": "exit 3"}.items()}
    for state, job_id in ids.items():
        cluster.wait_for_job(job_id, state)
        command = ("sacct", "--noheader", "--allocations", f"--jobs={job_id}", "--format=State,ExitCode", "--parsable2")
        expected = f"{state}|{3 if state == 'FAILED' else 0}:0\n"
        wait_for(lambda: cluster.run(*command) == expected, f"{expected} in accounting")  # noqa: B023


def test_controller_restart_keeps_a_running_job(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    job_id = submit("srun bash -c 'touch ready; while [ ! -e go ]; do sleep 0.1; done; echo $SLURM_JOB_ID done'")
    wait_for((tmp_path / "ready").exists, "the job's start")
    before = cluster.job(job_id)["StartTime"]
    cluster.restart_controller()
    assert cluster.job(job_id)["JobState"] == "RUNNING"
    (tmp_path / "go").touch()
    job = cluster.wait_for_job(job_id, "COMPLETED")
    assert (job["Restarts"], job["StartTime"]) == ("0", before)
    assert (tmp_path / "out").read_text() == f"{job_id} done\n"


def test_job_of_a_dead_node_runs_again_elsewhere(cluster: DevCluster, submit: Submit, tmp_path: Path) -> None:
    script = "echo $$ $SLURMD_NODENAME; [ $SLURM_RESTART_COUNT ] || sleep 300"
    job_id = submit(script, "--requeue", "--nodes=1", "--exclusive")
    wait_for_text("n", tmp_path / "out")
    dead = cluster.job(job_id)["NodeList"]
    cluster.kill_node(dead)
    cluster.wait_for_node(dead, "DOWN")
    job = cluster.wait_for_job(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert job["NodeList"] != dead
    # The first one never noticed: it still runs on the node that the controller believes dead.
    predecessor = int((tmp_path / "out").read_text().split()[0])
    assert predecessor in [process.pid for process in cluster_processes(cluster.dir)]
    cluster.start_node(dead)
    wait_for(lambda: predecessor not in [p.pid for p in cluster_processes(cluster.dir)], "the predecessor's end")


def test_options_change_signal_accounting_and_requeue(dir: Path) -> None:
    with DevCluster.start(dir, nodes=1, accounting=False, user_signal=False, job_requeue=False) as cluster:
        (dir / "task").write_text(NOTING_TASK)
        job_id = cluster.submit("srun bash task", f"--chdir={dir}", "--exclusive", "--signal=USR2@30")
        assert cluster.job(job_id)["Requeue"] == "0"
        wait_for((dir / "ready-0").exists, "the task")
        urgent = cluster.submit("true", f"--chdir={dir}", "--exclusive", "--partition=high")
        cluster.wait_for_job(urgent, "COMPLETED")
        assert (dir / "signals").read_text() == "TERM 0\n"
        with pytest.raises(RuntimeError, match="accounting storage is disabled"):
            cluster.run("sacct")
    assert_nothing_left(dir)


def test_command_line_up_and_down_beside_another_cluster(cluster: DevCluster, dir: Path) -> None:
    flags = ("--dir", dir, "--nodes", "1", "--no-accounting", "--max-array-size", "7")
    up = devcluster("up", *flags)
    assert up.returncode == 0, up.stderr
    processes = cluster_processes(dir)
    again = devcluster("up", *flags)
    assert (again.returncode, again.stdout) == (0, up.stdout)
    assert "already running" in again.stderr
    assert cluster_processes(dir) == processes
    # What `up` prints is all that a shell needs. The job leaves a process behind that left its session.
    script = f"{up.stdout} scontrol show config; srun bash -c 'setsid sleep 600 & sleep 600' & sleep 600"
    shell = subprocess.Popen(["bash", "-c", script], cwd=dir, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        wait_for(lambda: sum(p.name == "sleep" for p in cluster_processes(dir)) == 2, "the job")
        assert "n1" in devcluster("status", "--dir", dir).stdout
        down = devcluster("down", "--dir", dir)
        assert shell.poll() is None, "the user's own shell must live on"
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
    assert "MaxArraySize            = 7\n" in shell.communicate()[0]
    assert (down.returncode, down.stdout) == (0, "")
    assert_nothing_left(dir)
    assert devcluster("status", "--dir", dir).returncode == 1
    assert cluster.run("scontrol", "ping").strip().endswith("is UP")
    for name in cluster.nodes:
        cluster.wait_for_node(name, "IDLE")


def test_killed_up_cleans_up(dir: Path) -> None:
    up = subprocess.Popen([sys.executable, "-m", "slurm.devcluster", "up", "--dir", dir], cwd=REPOSITORY)
    wait_for((dir / "mysql").exists, "the database's setup")
    up.terminate()
    assert up.wait(timeout=30) == 143
    assert_nothing_left(dir)


def test_failed_up_tells_why_and_cleans_up(dir: Path, tmp_path: Path) -> None:
    daemon = tmp_path / "slurmctld"
    daemon.write_text("#!/bin/sh\necho the disk is on fire; exit 3\n")
    daemon.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    up = devcluster("up", "--dir", dir, "--no-accounting", env=env)
    assert (up.returncode, up.stdout) == (1, "")
    assert up.stderr == "devcluster: slurmctld ended with 3: the disk is on fire\n"
    assert_nothing_left(dir)


def test_up_needs_root(dir: Path) -> None:
    # Another user, who can read root's Python nonetheless.
    other = ["setpriv", "--reuid=65534", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    up = devcluster("up", "--dir", dir, prefix=other)
    assert (up.returncode, up.stdout) == (2, "")
    assert up.stderr.startswith("devcluster: the dev cluster needs root")
    assert up.stderr.count("\n") == 1


def test_up_names_the_missing_packages(dir: Path) -> None:
    up = devcluster("up", "--dir", dir, env={"PATH": "/nowhere"})
    assert (up.returncode, up.stdout) == (2, "")
    assert "apt-get install" in up.stderr
    assert devcluster("packages").stdout.split() == list(APT_PACKAGES)
    assert all(package in up.stderr for package in APT_PACKAGES)
    assert up.stderr.count("\n") == 1


def test_folder_with_other_things_is_never_touched(dir: Path) -> None:
    (dir / "thesis.tex").write_text("42")
    up = devcluster("up", "--dir", dir)
    assert (up.returncode, up.stderr) == (
        2,
        f"devcluster: the folder must be new, empty or a dev cluster's; got {dir}\n",
    )
    devcluster("down", "--dir", dir)
    assert (dir / "thesis.tex").read_text() == "42"


def test_remains_of_a_dead_cluster_are_replaced(dir: Path) -> None:
    options = {"nodes": 1, "accounting": False}
    dead = DevCluster.start(dir, **options)
    (dir / "remains").touch()
    for process in cluster_processes(dir):
        os.kill(process.pid, signal.SIGKILL)
    assert DevCluster.find(dir) is None
    with DevCluster.start(dir, **options) as cluster:
        assert not (dir / "remains").exists()
        assert cluster.node("n1")["State"] == "IDLE"
        with pytest.raises(ValueError, match=r"running in .* already"):
            DevCluster.start(dir, **options)
    dead.stop()
    assert_nothing_left(dir)


def test_taken_node_names_are_refused(dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostbyname", lambda name: "192.0.2.7")
    with pytest.raises(ValueError, match=r"n1 is 192\.0\.2\.7; choose another node_prefix"):
        DevCluster.start(dir)
    assert_nothing_left(dir)


@pytest.mark.parametrize("end", ["", "\n"])
def test_hosts_keeps_every_other_line(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HOSTS", tmp_path / "hosts")
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.0.1")
    machine.HOSTS.write_text(f"127.0.0.1 localhost{end}")
    machine.add_hosts(Path("/one"), ["n1", "n2"])
    machine.add_hosts(Path("/one/more"), ["n1"])
    machine.remove_hosts(Path("/one"))
    assert machine.HOSTS.read_text() == "127.0.0.1 localhost\n127.0.0.1 n1 # slurm.devcluster /one/more\n"
    machine.remove_hosts(Path("/one/more"))
    assert machine.HOSTS.read_text() == "127.0.0.1 localhost\n"


@pytest.mark.parametrize(
    "bad", [{"nodes": 0}, {"gpus_per_node": -1}, {"max_array_size": 1}, {"node_prefix": "n1"}, {"node_prefix": ""}]
)
def test_bad_options_are_named_with_their_value(bad: dict[str, object]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} must .*; got {value!r}"):
        Options(**bad)  # type: ignore[arg-type]


def test_flags_of_up_are_the_options() -> None:
    flags = vars(parser().parse_args(["up"]))
    assert Options(**{name: flags[name] for name in flags if name not in ("run", "dir")}) == Options()
