"""A run of any earlier version is sampled, evaluated and continued as if the code had never changed."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from commands.train import as_begun, check_same_settings
from commands.where import LaunchTraining
from diffusion.errors import UserError
from jobs.experiments.table import EXPERIMENTS as TABLE
from jobs.experiments.table import HALF_HIDDEN
from jobs.storage.run_folder import RunFolder
from tests.launching import NO_FIGURES, done, status
from tests.old_runs import ARCHIVES, EXPERIMENTS, unpack

HERE = ("--device", "cpu", "--cluster", "local")
SAMPLING = ("--name", "before", "--sampler", "ddim", "--steps", "5", *HERE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Callable[..., Path]:
    """The run that today's code alone makes of the arguments of an old one; once for all formats."""
    root = tmp_path_factory.mktemp("alone")

    @cache
    def today(*arguments: str) -> Path:
        # The preset of digits has got these since.
        done(*arguments, "--train.noise-levels", "None", cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
        return root / "runs" / arguments[1] / arguments[arguments.index("--name") + 1]

    return today


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def test_a_run_of_an_earlier_version(
    archive: Path, experiment: str, alone: Callable[..., Path], tmp_path: Path, mnist_root: Path
) -> None:
    run = unpack(archive, experiment, tmp_path / "runs", mnist_root)
    drawn = np.load(run / "samples" / "before" / "samples.npz")["arr_0"]
    logged = (run / "metrics.jsonl").read_bytes()

    # Samples are functions of the weights, the seed and their number: more of them begin with the same.
    done("sample", run, "--num-samples", 160, *SAMPLING, cwd=tmp_path, **NO_FIGURES)
    more = np.load(run / "samples" / "before" / "samples.npz")["arr_0"]
    assert more.shape == (160, *drawn.shape[1:])
    assert more.dtype == drawn.dtype
    # Another machine's kernels may round differently.
    assert np.abs(more[:128].astype(float) - drawn).max() <= (1 if drawn.dtype == np.uint8 else 1e-4)

    if (archive, experiment) == (ARCHIVES[0], "1d"):  # the others below, because digits take a minute
        evaluated(run, tmp_path)

    done("resume", run, *HERE, cwd=tmp_path, **NO_FIGURES)
    assert (status(run)["state"], status(run)["restarts"]) == ("finished", 1)
    theirs_alone = alone(*json.loads((run / "launch.json").read_text())["argv"][1:])
    continued = (run / "metrics.jsonl").read_bytes()
    assert continued.startswith(logged)
    ours, theirs = (list(map(json.loads, text.splitlines())) for text in (continued, read(theirs_alone)))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def test_samples_of_an_earlier_version_are_evaluated(
    archive: Path, experiment: str, tmp_path: Path, mnist_root: Path
) -> None:
    evaluated(unpack(archive, experiment, tmp_path / "runs", mnist_root), tmp_path)


def evaluated(run: Path, cwd: Path) -> None:
    shown = json.loads(done("evaluate", run, "--samples", "before", "--json", *HERE, cwd=cwd, **NO_FIGURES).out)
    assert shown["protocol"]["samples"]["step"] == status(run)["step"]
    assert shown["metrics"]


def read(run: Path) -> bytes:
    return (run / "metrics.jsonl").read_bytes()


def test_an_old_run_has_no_room_of_todays(tmp_path: Path) -> None:
    """What the tests on Slurm rest on: the old copy of the code knows nothing of today's classes."""
    run = unpack(ARCHIVES[0], "1d", tmp_path, tmp_path)
    assert (run / "code" / "jobs" / "job.py").is_file()
    assert not (run / "code" / "jobs" / "train").exists()


def test_an_old_run_keeps_what_presets_have_changed_by_the_command_that_began_it(tmp_path: Path) -> None:
    preset, where = TABLE["mnist-small"].preset, LaunchTraining(cluster="local", device="cpu")
    old = unpack(ARCHIVES[-1], "mnist-small", tmp_path, tmp_path)
    old_train, new_train = (as_begun(RunFolder(run), preset, where).train for run in (old, tmp_path / "new"))
    assert (old_train.held_out_every, old_train.noise_levels) == (0, None)
    assert (new_train.held_out_every, new_train.noise_levels) == (preset.train.held_out_every, HALF_HIDDEN)
    assert preset.train.held_out_every > 0
    # A run of today that was begun with other levels is another run.
    run = RunFolder(tmp_path / "mnist-small" / "b")
    run.create(
        "mnist-small", replace(preset, train=replace(new_train, noise_levels=None)), {}, lambda code: code.mkdir()
    )
    with pytest.raises(UserError, match=r"train\.noise-levels is None, not \(0\.1, 0\.9\)"):
        check_same_settings(run, "mnist-small", as_begun(run, preset, where))
