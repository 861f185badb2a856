"""On a GPU, too, a training gives the same bytes each time, compiled or not, and whatever interrupts it."""

import os
import signal
from pathlib import Path

import pytest

from jobs.doctor.drill import differences
from jobs.runtime.numerics import Kind
from jobs.storage.run_folder import RunFolder
from slurm import local
from tests.gpu.conftest import VARIABLE
from tests.gpu.jobs import DeterministicJob
from tests.launching import NO_FIGURES as FORKED_WITHOUT_FIGURES
from tests.launching import TINY, Process, done, finish, interrupt, start, steps_logged, wait_until
from tests.warm import NO_MATPLOTLIB, searched_first

SMALLEST = ("--model.dim", 8, "--model.dim-mults", 1, "--model.attn-heads", 1, "--train.batch-size", 4)
SETTINGS: dict[tuple[Kind, bool], tuple[object, ...]] = {
    ("cuda", False): ("mnist", "--train.steps", 100),
    ("cuda", True): ("mnist-small", "--train.steps", 400),
    ("cpu", False): ("mnist-small", "--train.steps", 60, *SMALLEST),
    ("cpu", True): ("1d", "--train.steps", 500, *TINY, "--model.layers", 1),
}
"""By device and whether it is compiled; compiling the network of `mnist` takes minutes."""
# Without fp32 in a rehearsal: other tests train so on CPUs, compiled and not.
PRECISIONS = ("bf16",) if os.environ.get(VARIABLE) == "cpu" else ("bf16", "fp32")
CASES = [(precision, compiled) for compiled in (False, True) for precision in PRECISIONS]
PLAIN_WITHOUT_FIGURES = {"PYTHONPATH": searched_first(NO_MATPLOTLIB)}
NO_FIGURES = FORKED_WITHOUT_FIGURES if os.environ.get(VARIABLE) == "cpu" else PLAIN_WITHOUT_FIGURES
"""What sees a GPU is started plainly."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("precision", "compiled"), CASES, ids=[f"{name}-{'compiled' if compiled else 'eager'}" for name, compiled in CASES]
)
def test_three_trainings_are_equal_though_one_was_interrupted(
    device: Kind, precision: str, compiled: bool, tmp_path: Path, mnist_root: Path
) -> None:
    settings = SETTINGS[device, compiled]
    command = ["train", *settings, "--train.log-every", 1, "--train.precision", precision, "--device", device]
    command += ["--train.compile"] if compiled else []
    runs = {name: RunFolder(tmp_path / "runs" / str(settings[0]) / name) for name in ("first", "second", "third")}

    def environment(start_of: str) -> dict[str, str]:
        """Each start compiles for itself: bytes must not hang on what an earlier one has left in a cache.

        In a rehearsal one compiles for all, if none has before.
        """
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{start_of}")} if compiled and see_gpus else {}
        return {"MNIST_ROOT": str(mnist_root), **cache, **NO_FIGURES}  # they have a test of their own

    def begun(*names: str) -> list[Process]:
        return [start(*command, "--name", name, cwd=tmp_path, see_gpus=see_gpus, **environment(name)) for name in names]

    see_gpus = device == "cuda"
    # Side by side, so that they disturb each other.
    others = begun("first", "second") if see_gpus else []
    (stopped,) = begun("third")
    wait_until(lambda: steps_logged(runs["third"].path) >= 20 or stopped.poll() is not None, timeout_s=500)
    assert interrupt(stopped, signal.SIGINT).code == 130
    for process in others or begun("first", "second"):
        assert finish(process).code == 0
    done(*command, "--name", "third", cwd=tmp_path, see_gpus=see_gpus, **environment("again"))
    assert runs["third"].read_status()["restarts"] == 1
    assert differences(runs["first"], runs["second"]) == []
    assert differences(runs["first"], runs["third"]) == []


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_operation_is_known_to_give_other_bytes_each_time(
    device: Kind, precision: str, mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert local.run(DeterministicJob(mnist_root, device, precision), 1).exit_code == 0


def test_the_drill_finds_equal_results(device: Kind, tmp_path: Path) -> None:
    where = ("--kills", 2 if device == "cuda" else 1, "--cluster", "local", "--device", device)
    drilled = done("drill", *where, cwd=tmp_path, see_gpus=device == "cuda", **NO_FIGURES)
    assert "Equal byte for byte" in drilled.out
