"""The device of these tests: a GPU, without which they fail, or a CPU, on which the same tests are rehearsed small."""

import os
from pathlib import Path

import pytest
import torch

from jobs.runtime.numerics import Kind
from slurm import local
from tests.jobs import parallel

VARIABLE = "GPU_TEST_DEVICE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> Kind:
    asked = os.environ.get(VARIABLE, "cuda")
    if asked == "cpu":
        return "cpu"
    if asked != "cuda":
        pytest.fail(f"{VARIABLE} must be cuda or cpu; got {asked}")
    if not torch.cuda.is_available():
        pytest.fail(f"these tests need a CUDA GPU, and torch finds none; {VARIABLE}=cpu rehearses them on a CPU")
    return "cuda"


@pytest.fixture(autouse=True)
def forked_jobs(device: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal forks the processes of jobs from one that has loaded torch, as other tests do."""
    if device == "cpu":
        monkeypatch.setattr(local, "run", lambda job, processes: parallel.run(job, processes)[0])
