"""On a GPU, too, a training gives the same bytes each time, compiled or not, and whatever interrupts it."""

import signal
from pathlib import Path

import pytest

from jobs.drill import differences
from jobs.run_folder import RunFolder
from jobs.world import Kind
from slurm import local
from tests.gpu.jobs import DeterministicJob
from tests.launching import TINY, done, finish, interrupt, start, steps_logged, wait_until

FEW_TIMESTEPS = ("--diffusion.timesteps", 21)
"""For a run whose figures take no time."""
SMALLEST = ("--model.dim", 8, "--model.dim-mults", 1, "--model.attn-heads", 1, "--train.batch-size", 4, *FEW_TIMESTEPS)
SETTINGS: dict[tuple[Kind, bool], tuple[object, ...]] = {
    ("cuda", False): ("mnist", "--train.steps", 200, *FEW_TIMESTEPS),
    ("cuda", True): ("mnist-small", "--train.steps", 400, *FEW_TIMESTEPS),
    ("cpu", False): ("mnist-small", "--train.steps", 60, *SMALLEST),
    ("cpu", True): ("1d", "--train.steps", 500, *TINY),
}
"""By device and whether it is compiled; compiling the network of `mnist` takes minutes."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_three_trainings_are_equal_though_one_was_interrupted(
    device: Kind, precision: str, compiled: bool, tmp_path: Path, mnist_root: Path
) -> None:
    if device == "cpu" and compiled and precision == "fp32":
        pytest.skip("compiling takes most of a rehearsal, and tests/jobs/test_compile.py does this on CPUs")
    settings = SETTINGS[device, compiled]
    command = ["train", *settings, "--train.log-every", 1, "--train.precision", precision, "--device", device]
    command += ["--train.compile"] if compiled else []
    runs = {name: RunFolder(tmp_path / "runs" / str(settings[0]) / name) for name in ("first", "second", "third")}

    def environment(start_of: str) -> dict[str, str]:
        """Each start compiles for itself: bytes must not hang on what an earlier one has left in a cache."""
        return {"MNIST_ROOT": str(mnist_root), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{start_of}")}

    # Side by side, so that they disturb each other.
    started = {name: start(*command, "--name", name, cwd=tmp_path, see_gpus=True, **environment(name)) for name in runs}
    stopped = started["third"]
    wait_until(lambda: steps_logged(runs["third"].path) >= 20 or stopped.poll() is not None, timeout_s=500)
    assert interrupt(stopped, signal.SIGINT).code == 130
    for name in ("first", "second"):
        assert finish(started[name]).code == 0
    done(*command, "--name", "third", cwd=tmp_path, see_gpus=True, **environment("again"))
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
    where = ("--kills", 2, "--cluster", "local", "--device", device)
    assert "Equal byte for byte" in done("drill", *where, cwd=tmp_path, see_gpus=True).out
