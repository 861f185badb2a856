"""The script that a dry run shows says what the profile says, for each of the forms that real sites ask for."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import launch
from jobs.experiments.experiment_json import write
from jobs.experiments.table import EXPERIMENTS
from jobs.storage.run_folder import RunFolder
from jobs.watch import logs
from slurm import queue
from slurm.environment import network
from slurm.profile import Profile
from slurm.submit import Submission
from tests.slurm.site import asks

TWO_NODES = ("--gpus", "8")


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for a login node: Slurm's commands answer, and write down how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    says = {"scontrol": "echo 'Slurmctld(primary) at here is UP'", "sbatch": "echo '17;west'"}
    says |= {"squeue": "echo 'CLUSTER: west'; echo '17|RUNNING'; echo '18_3|PENDING'"}
    for name in ("scontrol", "sbatch", "srun", "squeue", "scancel", "sacct"):
        called = f'echo {name} "$@" >> {shlex.quote(str(tmp_path / "calls"))}'
        (tools / name).write_text(f"#!/bin/sh\n{called}\n{says.get(name, '')}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("DIFFUSION_PROFILE", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(profile: str, *arguments: str) -> int:
    """Runs launch.py in this process, with the profile."""
    Path("site.toml").write_text(profile)
    before, sys.argv = sys.argv, ["launch.py", *arguments, "--profile", "site.toml"]
    try:
        return launch.main()
    finally:
        sys.argv = before


FOUR = "gpus_per_node = 4\n"
# The variation of SITES, the profile, the flags of the command, and those of sbatch: ... is one that must be absent.
VARIATIONS = [
    ("V1 gres alone", f"{FOUR}gpu_request = 'gres'", TWO_NODES, {"gres": "gpu:4", "gpus-per-node": ..., "nodes": "2"}),
    ("V2 typed", "gpu_type = 'a100'", (), {"gpus-per-node": "a100:1", "gres": ...}),
    ("V2 typed gres", "gpu_request = 'gres'\ngpu_type = 'v100'", ("--gpus", "2"), {"gres": "gpu:v100:2"}),
    ("V3 a slice", "gpu_request = 'gres'\ngpu_type = '1g.10gb'", (), {"gres": "gpu:1g.10gb:1"}),
    (
        "V3 another name",
        "gpu_request = 'none'\nsbatch.gres = 'nvidia_a30_2g:{gpus}'",
        ("--gpus", "2"),
        {"gres": "nvidia_a30_2g:2"},
    ),
    ("V4 V5 by node", FOUR, TWO_NODES, {"gpus-per-node": "4", "gpus": ..., "gpus-per-task": ..., "gres": ...}),
    ("V6 one form", "gpu_request = 'gres'\nsbatch.gres = 'lscratch:10'", (), {"gres": "gpu:1,lscratch:10"}),
    (
        "V7 compulsory",
        f"{FOUR}mem_per_cpu_gb = 4\nntasks = true",
        TWO_NODES,
        {"mem-per-cpu": "4GB", "mem": ..., "ntasks": "8", "ntasks-per-node": "4"},
    ),
    ("V8 by GPU", "mem_per_gpu_gb = 60", (), {"mem-per-gpu": "60GB", "mem": ...}),
    (
        "V8 without GPUs",
        "mem_per_gpu_gb = 60",
        ("--device", "cpu", "--gpus", "2"),
        {"mem": "120GB", "mem-per-gpu": ..., "gpus-per-node": ...},
    ),
    ("V9 the whole node", "mem_gb = 0", (), {"mem": "0"}),
    ("V9 on the command line", "mem_per_gpu_gb = 60", ("--slurm.mem-gb", "0"), {"mem": "0", "mem-per-gpu": ...}),
    ("V9 not the whole node", "mem_gb = 0", ("--slurm.mem-gb", "None"), {"mem": ...}),
    ("V9 another way taken away", "mem_per_cpu_gb = 4", ("--slurm.mem-gb", "None"), {"mem": ..., "mem-per-cpu": "4GB"}),
    ("V10 no word of memory", "", (), {"mem": ..., "mem-per-cpu": ..., "mem-per-gpu": ...}),
    ("V12 accounts", "account = 'xyz@v100'\nconstraint = 'v100-32g'", (), {"account": "xyz@v100"}),
    ("V12 no account", "", (), {"account": ...}),
    ("V13 no partition", "constraint = 'gpu'\nqos = 'regular'", (), {"partition": ..., "qos": "regular"}),
    (
        "V14 free flags",
        "exclude = 'n[3,17]'\n[sbatch]\nreservation = 'course'\nexclusive = true\nnice = 0\nlicenses = 'SCRATCH'",
        (),
        {"exclude": "n[3,17]", "reservation": "course", "exclusive": None, "nice": "0", "licenses": "SCRATCH"},
    ),
    (
        "V14 taken away",
        "sbatch.requeue = false\nsbatch.cpus-per-task = false",
        (),
        {"requeue": ..., "cpus-per-task": ...},
    ),
    ("V15 no wckey", "", (), {"wckey": ...}),
    ("V15 a wckey", "sbatch.wckey = 'thesis'", (), {"wckey": "thesis"}),
    ("V16 clusters", "cluster = 'wice'", (), {"clusters": "wice"}),
    ("V23 by task", f"{FOUR}gpu_request = 'gpus-per-task'\ngpu_type = 'l40s'", TWO_NODES, {"gpus-per-task": "l40s:1"}),
    ("none", "gpu_request = 'none'", (), {"gpus-per-node": ..., "gres": ..., "gpus-per-task": ...}),
]


@pytest.mark.parametrize(
    ("profile", "flags", "expected"), [row[1:] for row in VARIATIONS], ids=[v[0] for v in VARIATIONS]
)
def test_the_flags_of_sbatch(
    profile: str, flags: tuple[str, ...], expected: dict[str, object], answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(profile, "train", "1d", "--dry-run", *flags) == 0
    asked = asks(capsys.readouterr().out)
    assert {flag: asked.get(flag, ...) for flag in expected} == expected
    assert {"signal", "chdir", "output", "time"} <= asked.keys()
    assert not (answers / "runs").exists()


COMMANDS = [
    ("V14 srun without CPUs", "sbatch.cpus-per-task = false", ["srun"], ["--cpus-per-task"]),
    ("V17 a container", "python = 'apptainer exec --nv i.sif python'", ["apptainer exec --nv i.sif python -S -m"], []),
    ("V17 pyxis", "srun_args = ['--container-image=a b']", ["'--container-image=a b'"], []),
    ("V19 a login shell", "setup = ['source /etc/profile']", ["\nsource /etc/profile\n"], []),
    ("V23 binding", "srun_args = ['--gpu-bind=none']", ["--distribution=block:block --gpu-bind=none"], []),
    ("V22 environment", "environment = {NCCL_DEBUG = 'INFO'}", ["\nexport NCCL_DEBUG=INFO\n"], []),
]


@pytest.mark.parametrize(
    ("profile", "there", "absent"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS]
)
def test_the_commands_of_the_script(
    profile: str, there: list[str], absent: list[str], answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(profile, "train", "1d", "--dry-run") == 0
    script = capsys.readouterr().out
    assert [words for words in there if words not in script] == []
    assert [words for words in absent if words in script] == []


CONTRADICTIONS = [
    ("mem_gb = 4\nmem_per_cpu_gb = 2", "memory is asked for in one way; got slurm.mem-gb=4 and slurm.mem-per-cpu-gb=2"),
    ("mem_per_gpu_gb = 0", "slurm.mem-per-gpu-gb must be at least 1; got 0"),
    ("time_min = 2", "slurm.signal-delay-s must be less than the time limit"),
    ("gpu_request = 'none'\ngpu_type = 'a100'", "slurm.gpu-type=a100 needs a slurm.gpu-request"),
    ("gpu_request = 'gpus'", "gpu_request must be one of gpus-per-node, gres, gpus-per-task, none; got 'gpus'"),
    ("ntasks = 1", "ntasks must be true or false; got 1"),
    ("sbatch.gres = 'gpu:4'", "gres=gpu:4 and gpu_request=gpus-per-node would both ask for GPUs"),
    ("sbatch.partition = 'gpu'", "[sbatch] partition has a key of its own in a profile: partition"),
    ("sbatch.time = '1:00'", "[sbatch] time is the launcher's own: it sets this so that no run is lost; use time_min"),
    ("sbatch.signal = false", "[sbatch] signal is the launcher's own"),
    ("sbatch.C = 'gpu'", "long names of sbatch's flags without their dashes; got C"),
    ("sbatch.nice = [1]", "sbatch must be a table of values"),
    ("cpu.partitoin = 'cpu'", "[cpu]: partitoin is no key of a profile"),
    ("cpu.partition = 3", "[cpu]: partition must be a string; got 3"),
    ("interface = 'ib0'\nenvironment.NCCL_SOCKET_IFNAME = 'ib1'", "interface=ib0 sets NCCL_SOCKET_IFNAME"),
]


@pytest.mark.parametrize(("profile", "words"), CONTRADICTIONS)
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_what_contradicts_itself_gets_a_sentence(
    profile: str, words: str, cluster: str, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(profile, "train", "1d", "--cluster", cluster) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (answers / "runs").exists()


def test_jobs_without_gpus_are_asked_for_as_the_table_cpu_says(
    tmp_path: Path, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RunFolder(tmp_path / "runs" / "1d" / "a")
    made.path.mkdir(parents=True)
    (made.path / "experiment.json").write_text(write("1d", EXPERIMENTS["1d"].preset))
    profile = """
        partition = "gpu"
        account = "xyz@v100"
        constraint = "v100"
        mem_per_gpu_gb = 60
        [sbatch]
        licenses = "gpu:{gpus}"
        [cpu]
        partition = "cpu"
        account = "xyz@cpu"
        constraint = false
        mem_gb = 8
    """
    assert run(profile, "train", "1d", "--dry-run", "--device", "cpu") == 0
    asked = asks(capsys.readouterr().out)
    expected = {"partition": "cpu", "account": "xyz@cpu", "mem": "8GB"}
    assert {flag: asked.get(flag) for flag in expected} == expected
    assert not {"constraint", "gpus-per-node", "mem-per-gpu", "licenses"} & asked.keys()
    assert run(profile, "train", "1d", "--dry-run") == 0
    asked = asks(capsys.readouterr().out)
    expected = {"partition": "gpu", "account": "xyz@v100", "constraint": "v100", "mem-per-gpu": "60GB"}
    assert {flag: asked.get(flag) for flag in expected} == expected
    assert asked["licenses"] == "gpu:1"


def test_a_sweep_is_submitted_in_parts_where_jobs_are_limited(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("sweep", "1d", "--name", "s", "--grid", "train.seed=0,1,2,3,4", "--dry-run")
    for profile, elements in (("max_jobs = 3", "0-2%3"), ("max_jobs = 9", "0-4%5"), ("", "0-4%5")):
        assert run(profile, *sweep) == 0
        shown = capsys.readouterr().out
        assert asks(shown)["array"] == elements
        assert ("3 of 5 runs are submitted" in shown) == (elements == "0-2%3")
    assert not (answers / "runs").exists()


def test_all_questions_go_to_the_cluster_of_the_job(tmp_path: Path, answers: Path) -> None:
    """sbatch names the cluster with the job's id, and the run remembers it; no profile is asked later."""
    profile = Profile(cluster="west")
    submission = Submission("a", [print], profile, 1, False, tmp_path / "slurm", tmp_path)  # type: ignore[list-item]
    job_id = submission.submit()
    assert job_id == "west:17"
    assert (tmp_path / "slurm" / "17_submitted.pkl").exists()
    assert "#SBATCH --clusters=west\n" in (tmp_path / "slurm" / "17_submission.sh").read_text()
    assert queue.active([job_id, "west:18"]) == {"west:17": "RUNNING", "west:18_3": "PENDING"}
    queue.look([job_id])
    queue.cancel([job_id, "16"])
    queue.requeue(job_id)
    queue.max_array_size("west")
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    asked = {(call[0], "--clusters=west" in call) for call in calls}
    assert asked == {("sbatch", False), ("scancel", False)} | {
        (tool, True) for tool in ("squeue", "sacct", "scancel", "scontrol")
    }
    assert ["scancel", "--clusters=west", "17"] in calls
    assert ["scancel", "16"] in calls
    made = RunFolder(tmp_path / "runs" / "1d" / "a")
    (made.path / "slurm").mkdir(parents=True)
    (made.path / "launch.json").write_text(json.dumps({"job_ids": [job_id]}))
    assert logs.locate(made) == made.path / "slurm" / "17_0_log.out"


def test_the_fast_network_is_found(tmp_path: Path) -> None:
    kinds = {"docker0": ("1", "up"), "ib0": ("32", "down"), "ib1": ("32", "up"), "lo": ("772", "unknown")}
    for name, (kind, state) in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    assert network("auto", tmp_path) == {"NCCL_SOCKET_IFNAME": "ib1", "GLOO_SOCKET_IFNAME": "ib1"}
    for card in ("hsn0", "hsn1"):  # which NCCL uses both, and not another network beside them
        shutil.copytree(tmp_path / "ib1", tmp_path / card)
    assert network("auto", tmp_path) == {"NCCL_SOCKET_IFNAME": "hsn0,hsn1", "GLOO_SOCKET_IFNAME": "hsn0"}
    for card in ("hsn0", "hsn1"):
        shutil.rmtree(tmp_path / card)
    assert network("eth0", tmp_path) == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    (tmp_path / "ib1" / "operstate").write_text("down\n")
    assert network("auto", tmp_path) == {}
