"""What a submission to a real Slurm shows, refuses and costs."""

import re
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, launch
from tests.slurm.site import TRAINING, Site

pytestmark = pytest.mark.slurm


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
    missing = launch("train", "1d", cwd=tmp_path, SLURM_CONF="/nowhere/slurm.conf")
    assert missing.code == 2
    assert "scontrol ping" in missing.err


def test_a_job_submitted_from_within_an_salloc_gets_what_it_asks_for(site: Site) -> None:
    """The salloc's memory for each CPU and the job's memory for each node would contradict each other."""
    arguments = (*TRAINING, "--train.steps", 50, "--gpus", 2, "--name", "a", "--slurm.mem-gb", 1)
    command = ["env", "WANDB_MODE=disabled", "OMP_NUM_THREADS=1", sys.executable, ROOT / "launch.py", *arguments]
    site.cluster.run("salloc", f"--chdir={site.root}", "--mem-per-cpu=100", *map(str, command))
    site.finish(site.root / "runs" / "1d" / "a")


def test_submitting_does_not_import_torch(site: Site) -> None:
    arguments = (*TRAINING, "--train.steps", 20, "--gpus", 1, "--name", "a")
    submitted = launch(*arguments, cwd=site.root, PYTHONPROFILEIMPORTTIME="1", **site.cluster.env)
    assert submitted.code == 0
    imported = {
        line.rpartition("|")[2].strip() for line in submitted.err.splitlines() if line.startswith("import time:")
    }
    assert "submitit" in imported
    assert "torch" not in imported
