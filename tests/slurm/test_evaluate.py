"""Evaluations on a real Slurm: an array over the units, and a job after it that puts them together."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster
from tests.launching import NO_FIGURES, TINY, Finished, done, launch, wait_until
from tests.slurm.test_arrays import elements

pytestmark = pytest.mark.slurm

SLURM = ("--cluster", "slurm", "--device", "cpu", "--slurm.cpus-per-gpu", "1", "--slurm.time-min", "10")
NAME = "step-00000050-dpm++-10-seed0"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run a, and its copy b that one process here has evaluated."""
    root = tmp_path_factory.mktemp("evaluated")
    local = ("--cluster", "local")
    tiny = (*TINY, "--train.steps", "50", "--diffusion.timesteps", "30")
    done("train", "1d", *tiny, "--name", "a", *local, cwd=root, **NO_FIGURES)
    drawing = ("--num-samples", "2000", "--sampler", "dpm++", "--steps", "10")
    done("sample", "1d/a", *drawing, *local, cwd=root, **NO_FIGURES)
    shutil.copytree(root / "runs/1d/a", root / "runs/1d/b")
    done("evaluate", "1d/b", *local, cwd=root)
    return root


def on_slurm(root: Path, cluster: DevCluster, *more: object) -> Finished:
    return launch("evaluate", "1d/a", *SLURM, "--gpus", 2, *more, cwd=root, **cluster.env)


def test_a_killed_array_goes_on_and_gives_the_numbers_of_one_process(cluster: DevCluster, root: Path) -> None:
    samples = root / "runs/1d/a/samples"
    assert on_slurm(root, cluster).code == 0
    refused = on_slurm(root, cluster)
    assert refused.code == 2
    assert "being evaluated already" in refused.err
    wait_until(lambda: any((root / "runs/1d/a").rglob(".evaluation/[!.]*-*.npz")), timeout_s=180)
    for process in elements(root):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: cluster.run("squeue", "--noheader") == "", timeout_s=180)
    assert (samples / NAME / "metrics.json").exists()  # the job after the array has made up for what was killed
    ended = on_slurm(root, cluster, "--wait")
    assert ended.code == 0, ended
    assert "W1 to the exact mixture" in ended.out
    for path in (root / "runs/1d/b/samples" / NAME).iterdir():
        if path.is_file():
            assert path.read_bytes() == (samples / NAME / path.name).read_bytes(), path.name
