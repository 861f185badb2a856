"""Fixtures that several folders of tests share."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.data.mnist import MNIST
from diffusion.errors import UserError
from jobs.runtime.malloc import keep_freed_memory
from tests import launching, processes
from tests.warm import NO_MATPLOTLIB, searched_first

# A shell ignores Ctrl-C for what it starts in the background; commands that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
# Python is told in many containers to keep no bytecode: each command would compile the project, a quarter of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

keep_freed_memory()  # as jobs do: without that a tenth of the time of tests of mathematics is page faults
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # at the very end: to free a million objects one by one takes a second and more
gc.disable()  # until all tests are imported, and torch with them: that leaves hardly any garbage


def pytest_collection_finish() -> None:
    gc.freeze()  # else each collection would look at a million objects that stay, and pytest collects at its end
    gc.enable()


LONG = (
    *("test_survival.py", "test_arrays.py", "slurm/test_evaluate.py", "slurm/test_old_runs.py", "test_operate.py"),
    *("test_submission.py", "test_task.py", "slurm/test_devcluster.py", "slurm/test_ranges.py", "test_sites.py"),
    *("test_launch.py", "test_hangs.py", "test_tracking.py", "test_tracking_online.py", "test_secrets.py"),
)
"""Files of long tests; they come first, because at the end the other processes would wait for them."""

COLLECTED = {"slurm": "slurm", "data": "diffusion", "browser": "jobs"}
"""Where the tests with a marker are: to collect all others takes their `make` target seconds in each process."""


COLLECTED_IDS = pytest.StashKey[frozenset[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED_IDS] = frozenset(item.nodeid for item in items)
    items.sort(key=lambda item: next((i for i, file in enumerate(LONG) if item.path.match(file)), len(LONG)))
    for item in items:
        for marker, folder in COLLECTED.items():
            if item.get_closest_marker(marker) and item.path.parent.name != folder:
                raise pytest.UsageError(f"`make {marker}-test` looks in tests/{folder} alone, not at {item.nodeid}")
        if isinstance(item, pytest.Function) and processes.starts_some(item.function):
            item.add_marker("processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with processes.forbidden(not any(item.get_closest_marker(name) for name in processes.MARKERS)):
        return (yield)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that fails in the middle must not leave an endless training beside the others."""
    yield
    launching.kill_started()


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with MNIST in it: $MNIST_ROOT if that is complete, else fetched once for the session."""
    if "MNIST_ROOT" in os.environ:
        root = Path(os.environ["MNIST_ROOT"])
        try:
            MNIST.require(root)
            return root
        except UserError:
            pass
    root = tmp_path_factory.mktemp("mnist")
    with processes.forbidden(False):  # not the test that happens to be the first
        MNIST.fetch(root)
    return root


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> frozenset[str]:
    """The tests of all files that were collected, also those that a marker leaves out; none if one was named alone."""
    named = any("::" in argument for argument in pytestconfig.args)
    return frozenset() if named else pytestconfig.stash[COLLECTED_IDS]


@pytest.fixture
def no_plots() -> dict[str, str]:
    """An environment in which the plotting library cannot be imported."""
    return {"PYTHONPATH": searched_first(NO_MATPLOTLIB)}
