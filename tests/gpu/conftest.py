"""The device of these tests: a GPU, without which they fail, or a CPU, on which the same tests are rehearsed small."""

import os
from pathlib import Path

import pytest
import torch

from jobs.runtime.numerics import Kind

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
