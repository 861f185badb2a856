"""Two GPUs give the bytes of one, and NCCL, by which they talk, works beside CUDA graphs."""

import os
from pathlib import Path

import pytest
import torch

from jobs.doctor.drill import differences
from jobs.doctor.trial_job import DoctorJob
from jobs.runtime.numerics import Kind
from jobs.storage.run_folder import RunFolder
from slurm import local
from tests.gpu.conftest import VARIABLE
from tests.gpu.jobs import ExchangeJob
from tests.gpu.test_exact import NO_FIGURES, SMALLEST
from tests.launching import Finished, done

REHEARSED = os.environ.get(VARIABLE) == "cpu"
SIZES = ("--train.steps", 8, *SMALLEST) if REHEARSED else ("--train.steps", 100)
# tests/jobs/test_compile.py compiles on one and on two processes of a CPU.
COMPILED = [False] if REHEARSED else [False, True]


@pytest.fixture
def pair(device: Kind) -> None:
    """Two GPUs; a rehearsal has two processes."""
    gpus = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    if device == "cuda" and (len(gpus) < 2 or gpus[0] != gpus[1]):
        pytest.skip("needs two GPUs of one model")


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("compiled", COMPILED)
def test_two_train_and_draw_the_bytes_of_one(compiled: bool, device: Kind, tmp_path: Path, mnist_root: Path) -> None:
    runs = tmp_path / "runs" / "mnist-small"

    def on(gpus: int, *command: object, name: str) -> Finished:
        where = ("--name", name, "--gpus", gpus, "--device", device, "--cluster", "local")
        env = {"MNIST_ROOT": str(mnist_root), **NO_FIGURES}
        return done(*command, *where, cwd=tmp_path, see_gpus=device == "cuda", **env)

    train = ("train", "mnist-small", *SIZES, "--train.grad-shards", 2, "--train.log-every", 1)
    train += ("--train.compile",) if compiled else ()
    on(1, *train, name="one")
    for name, more in {"two": (), **({} if compiled else {"captured": ("--train.cuda-graph", "always")})}.items():
        said = on(2, *train, *more, name=name).out
        assert "cannot be captured" not in said and "goes on uncompiled" not in said
        assert differences(RunFolder(runs / "one"), RunFolder(runs / name)) == []

    sample = ("sample", "mnist-small/one", "--num-samples", 600, "--sampler", "ddim", "--steps", 2)
    for gpus in (1, 2):
        on(gpus, *sample, name=f"by-{gpus}")
    drawn = [(runs / "one" / "samples" / f"by-{gpus}" / "samples.npz").read_bytes() for gpus in (1, 2)]
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("pair")
def test_the_doctor_finds_that_two_reach_each_other(device: Kind, tmp_path: Path) -> None:
    job = DoctorJob(tmp_path, 2, device)
    assert local.run(job, 2).exit_code == 0
    assert {finding.level for finding in job.findings()} == {"ok"}


def test_gradients_are_exchanged_between_graphs(device: Kind, tmp_path: Path) -> None:
    """By a process alone, which is a whole group of NCCL's: one GPU is enough."""
    assert local.run(ExchangeJob(tmp_path, device), 1).exit_code == 0
