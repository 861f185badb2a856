"""Samples led away from the predictions of an earlier checkpoint: what is drawn, with which one, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.errors import UserError
from jobs.sample import autoguidance, draw, sample_set
from jobs.sample.autoguidance import Autoguidance
from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder
from tests.launching import NO_FIGURES, TINY, done, launch, sentence


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a 1D run and a tiny MNIST run that have kept earlier checkpoints, of starts of their own."""
    root = tmp_path_factory.mktemp("trained")
    of_digits = ("--model.dim", 8, "--train.batch-size", 4, "--train.keep-every", 1)
    for name, settings, first, *later in (
        ("1d", (*TINY, "--train.keep-every", 10), 10, 20, 30, 40),
        ("mnist-small", of_digits, 1, 4),
    ):
        asked = ("train", name, *settings, "--train.steps", first, "--name", "a")
        done(*asked, cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
        for steps in later:  # the last checkpoint of each start is waited for
            done("resume", f"{name}/a", "--train.steps", steps, cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def run(root: Path) -> RunFolder:
    return RunFolder(root / "runs" / "1d" / "a")


def by_hand(run: RunFolder, settings: sample_set.SampleSettings, n: int) -> np.ndarray:
    """Samples of a 1D run, from the weights in its files and the formula of the paper."""
    experiment = run.read_experiment()[1].build()

    def of(step: int) -> Callable[[Tensor, Tensor], Tensor]:
        model = experiment.build_model().eval()
        model.network.load_state_dict(load_file(run.checkpoints / f"step-{step:08d}" / "ema.safetensors"))
        return model.predict

    strong, weak = of(40), of(10)

    def predict(xt: Tensor, t: Tensor) -> Tensor:
        return 2.5 * strong(xt, t) + (1 - 2.5) * weak(xt, t)

    with torch.inference_mode():
        abar = experiment.build_model().alphas_cumprod
        return np.asarray(experiment.to_array(draw.draw(predict, abar, experiment, settings, 0, 4096)[:n]))


def test_a_set_is_drawn_by_both_weights_and_has_the_same_bytes_on_any_number_of_processes(
    root: Path, run: RunFolder
) -> None:
    how = ("sample", "1d/a", "--num-samples", 70_000, "--steps", 5, "--autoguidance", 2.5, "--device", "cpu")
    for processes in (1, 2):
        done(*how, "--gpus", processes, "--name", f"by-{processes}", cwd=root, **NO_FIGURES)
    one, two = (np.load(run.samples / f"by-{processes}" / "samples.npz")["arr_0"] for processes in (1, 2))
    assert one.tobytes() == two.tobytes()
    samples = sample_set.read(run, "by-1")
    weak = Autoguidance(2.5, 10, checkpoints.ledger(run.checkpoints)[10]["ema.safetensors"])
    assert samples.settings.autoguidance == weak
    assert samples.settings.evaluations == 10
    expected = by_hand(run, samples.settings, 4000)
    np.testing.assert_allclose(one[:4000], expected, rtol=0, atol=1e-4)
    plain = done("sample", "1d/a", "--num-samples", 4000, "--steps", 5, "--name", "plain", cwd=root, **NO_FIGURES)
    assert "autoguidance" not in plain.out
    assert "autoguidance" not in run.read_samples("plain")
    assert np.abs(one[:4000] - np.load(run.samples / "plain" / "samples.npz")["arr_0"]).mean() > 0.01


def test_a_set_goes_on_as_it_was_begun_and_is_not_mixed_with_others(root: Path, run: RunFolder) -> None:
    how = ("sample", "1d/a", "--steps", 5, "--name", "s")
    done(*how, "--num-samples", 10, "--autoguidance", 2, "--weak-checkpoint", 20, cwd=root, **NO_FIGURES)
    begun = np.load(run.samples / "s" / "samples.npz")["arr_0"]
    done(*how, "--num-samples", 20, cwd=root, **NO_FIGURES)
    assert np.array_equal(np.load(run.samples / "s" / "samples.npz")["arr_0"][:10], begun)
    for *other, theirs in (
        ("--autoguidance", 1, "1"),
        ("--autoguidance", 3, "3 by step 20"),
        ("--weak-checkpoint", 10, "2 by step 10"),
    ):
        ended = launch(*how, *other, "--num-samples", 20, cwd=root)
        assert ended.code == 2
        assert f"drawn with autoguidance=2 by step 20, not {theirs}; choose another --name" in sentence(ended.err)
    # A complete set needs its weights no more; else the training must keep them.
    (run.checkpoints / "step-00000020").rename(root / "gone")
    assert "20 samples are in" in done(*how, "--autoguidance", 2, "--num-samples", 20, cwd=root).out
    sample_set.read(run, "s").write_manifest()  # as a kill leaves it behind
    assert run.drawn_steps() == {20, 40}
    (run.samples / "s" / "shard-00000.npy").unlink()
    ended = launch(*how, "--num-samples", 20, cwd=root)
    assert ended.code == 2
    assert "the checkpoint of step 20, which guides these samples, is gone, or has changed;" in sentence(ended.err)
    (root / "gone").rename(run.checkpoints / "step-00000020")
    done(*how, "--num-samples", 20, cwd=root, **NO_FIGURES)
    assert np.array_equal(np.load(run.samples / "s" / "samples.npz")["arr_0"][:10], begun)


def test_a_set_begun_before_its_sampler_was_autoguided_is_named(root: Path) -> None:
    how = ("sample", "mnist-small/a", "--steps", 2)
    done(*how, "--autoguidance", 1, "--num-samples", 10, cwd=root, **NO_FIGURES)
    run = RunFolder(root / "runs" / "mnist-small" / "a")
    (begun,) = sample_set.complete(run)
    sample_set.read(run, begun).write_manifest()  # as a kill leaves it behind
    words = f"the same command with --name {begun} --num-samples 10 draws the rest of that set"
    assert words in done(*how, "--num-samples", 10, cwd=root, **NO_FIGURES).out
    assert words not in done(*how[:-1], 3, "--num-samples", 10, cwd=root, **NO_FIGURES).out


def shown(root: Path, *arguments: object) -> dict[str, object]:
    out = done("sample", *arguments, "--dry-run", cwd=root).out
    return dict(json.loads(out[: out.index("\n}") + 2]))


def test_the_default_is_for_the_experiments_own_sampler_and_for_runs_that_have_kept_a_checkpoint(root: Path) -> None:
    weak = shown(root, "mnist-small/a")["autoguidance"]
    assert isinstance(weak, dict)
    assert (weak["scale"], weak["step"]) == (2.0, 1)
    assert shown(root, "mnist-small/a", "--steps", 7)["autoguidance"] == weak
    assert "autoguidance" not in shown(root, "mnist-small/a", "--sampler", "ddim")
    assert "autoguidance" not in shown(root, "mnist-small/a", "--autoguidance", 1)
    assert "autoguidance" not in shown(root, "1d/a")
    assert shown(root, "mnist-small/a", "--sampler", "ddim", "--autoguidance", 3)["autoguidance"] == {
        **weak,
        "scale": 3.0,
    }
    early = done("sample", "mnist-small/a", "--checkpoint", 1, "--dry-run", cwd=root)
    assert "mnist-small/a has kept no good checkpoint with at most half of the 1 steps" in early.err
    assert '"autoguidance"' not in early.out


def chosen(
    run: RunFolder,
    step: int = 40,
    scale: float | None = 2,
    weak: int | None = None,
    keep_every: int = 10,
    said: Callable[[str], None] = pytest.fail,
) -> int | None:
    how = {"scale": scale, "weak": weak, "default": 1.0, "keep_every": keep_every}
    found = autoguidance.choose(run, step, "ema", **how, say=said)  # type: ignore[arg-type]
    return found and found.step


@pytest.mark.processes  # a training before it
def test_the_weak_checkpoint_is_the_nearest_good_one_to_a_quarter_of_the_steps(run: RunFolder) -> None:
    assert (chosen(run), chosen(run, 30), chosen(run, weak=30), chosen(run, scale=1)) == (10, 10, 30, None)
    # Where the training was interrupted does not decide over samples.
    shutil.copytree(run.checkpoints / "step-00000010", run.checkpoints / "step-00000005")
    assert (chosen(run, 20), chosen(run, keep_every=20)) == (10, 20)
    (run.checkpoints / "step-00000010" / "optimizer.pt").write_bytes(b"damaged")
    said: list[str] = []
    assert chosen(run, said=said.append) == 20
    assert "it cannot guide these samples, so another one does" in said[0]
    with pytest.raises(UserError, match=r"step-00000010: optimizer\.pt has not the size that was written"):
        chosen(run, weak=10)
    for wrong, words in (
        ({"keep_every": 0}, "--autoguidance 2 needs --weak-checkpoint, because .* at most half of the 40 steps"),
        ({"weak": 40}, r"--weak-checkpoint must be a step before 40 that .* holds \(30, 20, 10, 5\); got 40"),
        ({"weak": 15}, "--weak-checkpoint must be a step before 40"),
        ({"weak": 10, "scale": None}, "--weak-checkpoint needs --autoguidance above 1"),
        ({"scale": 0.5}, "--autoguidance must be at least 1 and finite; got 0.5"),
        ({"scale": float("inf")}, "--autoguidance must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            chosen(run, **wrong)  # type: ignore[arg-type]
