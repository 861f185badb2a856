"""What a submission to a real Slurm shows, refuses and costs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.storage import checkpoints, ownership
from tests.launching import NO_FIGURES, ROOT, TINY, done, launch, sentence, status, steps_logged, wait_until
from tests.slurm.site import TRAINING, Site, state
from tests.warm import NO_MATPLOTLIB, searched_first

pytestmark = pytest.mark.slurm


def test_a_dry_run_shows_the_script_that_would_be_submitted_and_writes_nothing(site: Site) -> None:
    where = ("--slurm.gpus-per-node", 1, "--slurm.partition", "low")
    arguments = (*TRAINING, "--train.steps", 50, "--gpus", 2, "--name", "a", *where)
    shown = site.launch(*arguments, "--dry-run")
    assert shown.code == 0
    assert list(site.root.iterdir()) == []
    script = shown.out[shown.out.index("#!/bin/bash") :].strip()
    run = site.train("a", 2, *where, steps=50)
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
    missing = launch("train", "1d", cwd=tmp_path, SLURM_CONF="/nowhere/slurm.conf")
    assert missing.code == 2
    assert "scontrol ping" in missing.err


def test_a_job_submitted_from_within_an_salloc_gets_what_it_asks_for(site: Site) -> None:
    """The salloc's memory for each CPU and the job's memory for each node would contradict each other."""
    arguments = (*TRAINING, "--train.steps", 50, "--gpus", 2, "--name", "a", "--slurm.mem-gb", 1)
    env = ("WANDB_MODE=disabled", "OMP_NUM_THREADS=1", f"PYTHONPATH={searched_first(NO_MATPLOTLIB)}")
    command = ["env", *env, sys.executable, ROOT / "launch.py", *arguments]
    site.cluster.run("salloc", f"--chdir={site.root}", "--mem-per-cpu=100", *map(str, command))
    site.finish(site.root / "runs" / "1d" / "a")


def test_a_cluster_that_is_named_is_asked_for_its_jobs(site: Site) -> None:
    named = ("--slurm.cluster", "devcluster")
    run = site.train("a", 2, *named, steps=50)
    assert site.job_id(run).startswith("devcluster:")
    wait_until(lambda: state(run) == "finished", timeout_s=120)
    sampling = ("sample", run, "--num-samples", 20_000, "--gpus", 2, "--device", "cpu", "--slurm.cpus-per-gpu", 1)
    drawn = site.launch(*sampling, "--cluster", "slurm", "--wait", *named, **NO_FIGURES)
    assert drawn.code == 0, drawn
    assert "20,000 samples are in" in drawn.out
    endless = site.train("b", 1, *named, steps=10**6)
    ended = site.launch("cancel", endless)
    assert ended.code == 0, ended
    number = site.job_id(endless).removeprefix("devcluster:")
    assert site.cluster.wait_for_job(number, "CANCELLED")


PLAIN = (
    *("train", "1d", *TINY, "--train.checkpoint-every", 50, "--device", "cpu", "--gpus", 4),
    *("--tracking.mode", "disabled"),
)


def in_an_salloc(site: Site, *arguments: object) -> "subprocess.Popen[str]":
    """Starts launch.py in an allocation of two nodes with two tasks on each; its shell is on neither.

    It finds no plotting library.
    """
    command = ["salloc", "--nodes=2", "--ntasks-per-node=2", f"--chdir={site.root}", sys.executable, ROOT / "launch.py"]
    return subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        env={**os.environ, **site.cluster.env, "OMP_NUM_THREADS": "1", "PYTHONPATH": searched_first(NO_MATPLOTLIB)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_plain_run_in_an_salloc_takes_all_its_nodes(site: Site) -> None:
    arguments = (*PLAIN, "--train.steps", 50)
    shown, _ = in_an_salloc(site, *arguments, "--dry-run").communicate(timeout=60)
    assert "in this allocation, 2 processes on each of 2 nodes" in shown
    refused, _ = in_an_salloc(site, *arguments, "--gpus", 8).communicate(timeout=60)
    assert "--gpus must be at most 4 in this allocation of 2 nodes, 2 on each; got 8" in sentence(refused)
    said, _ = in_an_salloc(site, *arguments, "--name", "spread").communicate(timeout=240)
    runs = site.root / "runs" / "1d"
    assert status(runs / "spread")["state"] == "finished", said
    assert said.count("Finished runs/1d/spread at step 50") == 1  # the others keep silent
    job_id = said.partition("Granted job allocation ")[2].split()[0]
    question = ("sacct", "--noheader", "--parsable2", "--format=NNodes,NTasks,State", f"--jobs={job_id}.0")
    wait_until(lambda: site.cluster.run(*question).strip() == "2|4|COMPLETED")
    done(*arguments, "--name", "here", "--cluster", "local", cwd=site.root, **NO_FIGURES)
    saved = [runs / name / "checkpoints" / "step-00000050" / "ema.safetensors" for name in ("spread", "here")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, "interrupted"), (signal.SIGKILL, "cancelled")], ids=["Ctrl-C", "a kill"]
)
def test_a_plain_run_in_an_salloc_is_stopped(number: signal.Signals, expected: str, site: Site) -> None:
    salloc = in_an_salloc(site, *PLAIN, "--train.steps", 1_000_000, "--name", "a")
    run = site.root / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 60, timeout_s=120)
    (launcher,) = ownership.holders(run)
    os.kill(launcher, number)
    said, _ = salloc.communicate(timeout=120)
    wait_until(lambda: status(run)["state"] == expected)
    assert checkpoints.steps(run / "checkpoints")[0] == status(run)["step"], said
    if number == signal.SIGINT:
        assert salloc.returncode == 130
        assert "Continue with" in said
        assert "srun: error" not in said  # it would end those that are still saving


def test_submitting_does_not_import_torch(site: Site) -> None:
    arguments = (*TRAINING, "--train.steps", 20, "--gpus", 1, "--name", "a")
    submitted = launch(*arguments, cwd=site.root, PYTHONPROFILEIMPORTTIME="1", **site.cluster.env)
    assert submitted.code == 0
    imported = {
        line.rpartition("|")[2].strip() for line in submitted.err.splitlines() if line.startswith("import time:")
    }
    assert "submitit" in imported
    assert "torch" not in imported
