"""The doctor finds the faults that a machine has, and none that it has not."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.data.mnist import MNIST
from jobs.doctor import machine
from jobs.doctor.machine import Finding
from jobs.doctor.trial_job import DoctorJob
from jobs.files import write_json
from jobs.runtime.numerics import Kind
from jobs.storage import faults
from jobs.storage.run_folder import RunFolder, State
from tests.jobs import parallel
from tests.launching import launch

WELL = {
    "node": "n1",
    "visible": None,
    "gpus": 2,
    "tasks_here": 2,
    "mean": 0.5,
    "reduce_s": 0.1,
    "wrong_from": [],
    "unseen": [],
}
"""What one of two tasks finds where all is well."""


def find(findings: list[Finding], words: str) -> Finding:
    (found,) = (finding for finding in findings if words in finding.what)
    return found


def examine(runs_dir: Path, data_root: Path, is_shared: bool = False) -> list[Finding]:
    return list(machine.examine(runs_dir, data_root, is_shared))


def test_a_machine_in_good_order(tmp_path: Path, mnist_root: Path) -> None:
    findings = examine(tmp_path / "runs", mnist_root)
    assert [finding for finding in findings if finding.level == "problem"] == []
    assert find(findings, "MNIST").level == "ok"
    assert find(findings, "can be written and locked").level == "ok"
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.iterdir()) == []


def test_each_finding_that_is_not_ok_says_why_it_matters_and_what_helps(tmp_path: Path) -> None:
    worse = [finding for finding in examine(tmp_path, tmp_path, is_shared=True) if finding.level != "ok"]
    assert worse
    assert all(finding.why and finding.cure for finding in worse)


def test_nodes_that_runs_have_left_out_are_named_with_run_and_reason(tmp_path: Path, mnist_root: Path) -> None:
    for name, nodes in {"a": ("n7", "n7", "n2"), "b": ("n2", "n3"), "c": ("n7", "n7")}.items():
        run = RunFolder(tmp_path / "1d" / name)
        run.checkpoints.mkdir(parents=True)
        for node in nodes:
            write_json(run.status, {"state": State.RUNNING})
            faults.judge(run, 9, "task 1 was ended: Killed", node)
        faults.forgive(run)  # a person has continued it: the node is as bad as before
    (run.path / faults.FILE).write_text('{"of": "a later version"}\n')
    old = (tmp_path / "1d" / "a" / faults.FILE).read_text().replace("n7", "n8")
    run = RunFolder(tmp_path / "1d" / "d")
    run.path.mkdir()
    (run.path / faults.FILE).write_text(re.sub(r'"time": "\d+-', '"time": "2020-', old))
    found = find(examine(tmp_path, mnist_root), "was left out by")
    assert found.level == "warning"
    assert re.fullmatch(r"n7 was left out by 1d/a \(\d{4}-\d\d-\d\d: task 1 was ended: Killed\)", found.what)
    assert "--slurm.exclude n7" in found.cure


def test_missing_and_wrong_data(tmp_path: Path, mnist_root: Path) -> None:
    assert find(examine(tmp_path, tmp_path / "nothing"), "MNIST").level == "warning"
    shutil.copytree(MNIST.raw_folder(mnist_root), MNIST.raw_folder(tmp_path))
    wrong = MNIST.raw_folder(tmp_path) / "t10k-labels-idx1-ubyte"
    wrong.write_bytes(bytes(wrong.stat().st_size))
    finding = find(examine(tmp_path, tmp_path), "MNIST")
    assert finding.level == "problem"
    assert wrong.name in finding.what


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert find(examine(Path("/proc/runs"), tmp_path), "cannot be written").level == "problem"


def test_a_small_disk_and_a_file_system_of_one_machine(tmp_path: Path) -> None:
    disk = tmp_path / 'a "disk"\t\\of\rone\u2028caf\u00e9'  # some of it is escaped in the list of mounts
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        findings = examine(disk / "runs", tmp_path, is_shared=True)
        assert find(findings, "GB are free").level == "problem"
        assert "tmpfs" in find(findings, "other machines may not see").what
    finally:
        subprocess.run(["umount", disk], check=True)


def test_wandb_without_key_and_as_the_tracking_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert find(examine(tmp_path, tmp_path), "there is no key").level == "warning"
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "soon")
    assert find(examine(tmp_path, tmp_path), "does not take the value of WANDB_HTTP_TIMEOUT").level == "warning"
    monkeypatch.delenv("WANDB_HTTP_TIMEOUT")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setattr(machine, "why_not_online", lambda server: f"{server} is asked")
    assert find(examine(tmp_path, tmp_path), "https://wandb.example is asked").level == "warning"
    monkeypatch.setattr(machine, "why_not_online", lambda server: None)
    assert find(examine(tmp_path, tmp_path), "wandb.example answers and accepts the key").level == "ok"
    # What is set up to send nothing asks no server.
    for word, mode in {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.items():
        monkeypatch.setenv("WANDB_MODE", word)
        said = find(examine(tmp_path, tmp_path), f"wandb is {mode}, as WANDB_MODE={word} says").what
        assert "accepts the key" not in said
        assert ("sync RUN" in said) == (mode == "offline")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert find(examine(tmp_path, tmp_path), "wandb.example answers and accepts the key").level == "ok"
    monkeypatch.setitem(sys.modules, "wandb", None)  # it cannot be imported
    for word, found in {"offline": "wandb is not there", "disabled": "wandb is disabled"}.items():
        monkeypatch.setenv("WANDB_MODE", word)
        assert find(examine(tmp_path, tmp_path), found).level == ("ok" if word == "disabled" else "warning")


def test_the_command_for_people_and_for_scripts(tmp_path: Path, mnist_root: Path) -> None:
    where = ("--cluster", "local", "--device", "cpu")
    env = {"MNIST_ROOT": str(mnist_root), "SLURM_CONF": "/nowhere/slurm.conf", "COLUMNS": "80"}
    # What `wandb login --host` leaves behind.
    (tmp_path / "settings").write_text("[default]\nbase_url = http://127.0.0.1:1\n")
    env |= {"WANDB_CONFIG_DIR": str(tmp_path), "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": ""}
    shown = launch("doctor", *where, cwd=tmp_path, **env)
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 80
    listed = json.loads(launch("doctor", "--json", *where, cwd=tmp_path, **env).out)
    assert all(set(finding) == {"level", "what", "why", "cure"} for finding in listed)
    assert shown.code == int(any(finding["level"] == "problem" for finding in listed))
    assert any("wandb is offline: http://127.0.0.1:1 does not answer" in finding["what"] for finding in listed)
    refused = launch("doctor", "--submit", *where, cwd=tmp_path, **env)
    assert refused.code == 2
    assert "--submit needs a Slurm" in refused.err


@pytest.mark.processes
def test_the_test_job_in_two_processes(tmp_path: Path) -> None:
    job = DoctorJob(tmp_path, 2, "cpu")
    outcome, err = parallel.run(job, 2)
    assert outcome.exit_code == 0, err
    findings = list(job.findings())
    assert {finding.level for finding in findings} == {"ok"}
    assert find(findings, "reach each other")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("function", "pairs"), [("torch.distributed.all_to_all_single", 1), ("jobs.runtime.world.all_gather", 2)]
)
def test_a_task_whose_numbers_arrive_wrong_is_named(function: str, pairs: int, tmp_path: Path) -> None:
    """One of 4 million, by the transport of a training's gradients; all others and the sum of one number are right."""
    job = DoctorJob(tmp_path, 2, "cpu")
    outcome, err = parallel.run(parallel.GarblingJob(job, function), 2)
    assert outcome.exit_code == 0, err
    (problem,) = (finding for finding in job.findings() if finding.level == "problem")
    node = json.loads((tmp_path / "result-1.json").read_text())["node"]
    assert f"task 0 on {node} received wrong numbers from task 1 on {node}" in problem.what
    assert f"in {pairs} of 4 pairs of tasks" in problem.what


@pytest.mark.parametrize(("gpus", "tasks"), [(0, 1), (0, 2), (2, 4)])
def test_a_test_job_that_finds_no_gpus(gpus: int, tasks: int, tmp_path: Path) -> None:
    job = DoctorJob(tmp_path, tasks, "cuda")
    seen = {"node": "n1", "visible": "0", "gpus": gpus, "tasks_here": tasks}
    (tmp_path / "result-0.json").write_text(json.dumps(seen))
    (finding,) = job.findings()
    assert finding.level == "problem"
    assert f"task 0 on n1 sees {gpus} GPUs" in finding.what


def test_tasks_that_are_shown_their_own_gpu_alone_are_fine(tmp_path: Path) -> None:
    job = DoctorJob(tmp_path, 2, "cuda")
    seen = {**WELL, "visible": "0", "gpus": 1}
    for rank in range(2):
        (tmp_path / f"result-{rank}.json").write_text(json.dumps(seen))
    assert {finding.level for finding in job.findings()} == {"ok"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("broken", ["unseen", "mean", "wrong_from", "lost", "failed"])
def test_what_a_broken_cluster_does_to_the_test_job(broken: str, device: Kind, tmp_path: Path) -> None:
    job = DoctorJob(tmp_path, 2, device)
    wrong = {"unseen": {"unseen": [0]}, "mean": {"mean": 0.0}, "wrong_from": {"wrong_from": [0]}}.get(broken, {})
    (tmp_path / "result-0.json").write_text(json.dumps(WELL))
    if broken == "failed":
        job.failed(1, "Traceback\nRuntimeError: connection refused\n")
    elif broken != "lost":
        (tmp_path / "result-1.json").write_text(json.dumps({**WELL, **wrong}))
    (problem,) = (finding for finding in job.findings() if finding.level == "problem")
    words = {"unseen": "task 1 does not see", "mean": "wrong sum", "lost": "from tasks 1", "failed": "refused"}
    assert words.get(broken, "task 1 on n1 received wrong numbers from task 0 on n1") in problem.what
    between_gpus = device == "cuda" and broken in ("mean", "wrong_from", "lost")
    assert ("NCCL_P2P_DISABLE=1" in problem.cure) == between_gpus
