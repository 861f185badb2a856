"""`export` makes a model that draws the same samples without this project, with a card that the Hub takes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from packaging.requirements import Requirement

from jobs.files import sha256, write_json
from jobs.publish import drawing, folder
from jobs.storage.run_folder import RunFolder
from tests.launching import NO_FIGURES, TINY, done, launch

ASKED = ("--classes", "1,0", "--guidance", "1.5")
DRAW = {
    "1d": ("--num-samples", 5000, "--sampler", "ddpm", "--steps", 5, "--seed", 3, "--autoguidance", 1.5),
    "mnist-small": ("--num-samples", 70, "--sampler", "ddim", "--steps", 2, "--eta", 0.5, "--autoguidance", 2),
    "1d-classes": ("--num-samples", 5000, "--steps", 3, *ASKED),
    "mnist-classes-small": ("--num-samples", 70, "--sampler", "ddim", "--steps", 2, "--guidance", 2),
}
SIZE = {name: TINY if name.startswith("1d") else ("--model.dim", 8, "--train.batch-size", 4) for name in DRAW}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a 1D run and a tiny MNIST run, each with a set of samples."""
    root = tmp_path_factory.mktemp("trained")
    for experiment in DRAW:
        settings = (*SIZE[experiment], "--train.steps", 1, "--train.seed", 7, "--train.keep-every", 1, "--name", "a")
        done("train", experiment, *settings, cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
        again = ("resume", f"{experiment}/a", "--train.steps", 3)
        done(*again, cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
        done("sample", f"{experiment}/a", *DRAW[experiment], "--name", "s", cwd=root)
    done("sample", "1d-classes/a", *DRAW["1d-classes"][:4], "--name", "newer", cwd=root)  # what export takes over
    return root / "runs"


def install(names: list[str], folder: Path) -> Path:
    """A Python of its own that has these packages and what they need, as after `pip install`, but linked from ours."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    todo, seen = [Requirement(name) for name in names], set()
    while todo:
        if str(asked := todo.pop()) in seen:
            continue
        seen.add(str(asked))
        package = distribution(asked.name)
        for needed in map(Requirement, package.requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": x}) for x in ("", *asked.extras)):
                todo.append(needed)
        for name in {path.parts[0] for path in package.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(package.locate_file(name))))
    return folder / "bin" / "python"


def generated(model: Path, count: int, tmp_path: Path, *more: str) -> dict[str, np.ndarray]:
    """What generate.py writes where nothing is installed but what the card says."""
    (packages,) = re.findall(r"^pip install (.*)   #", (model / "README.md").read_text(), re.MULTILINE)
    python = install(packages.split(), tmp_path / "venv")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = [python, model / "generate.py", "--num-samples", str(count), "--out", tmp_path / "drawn.npz", *more]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(np.load(tmp_path / "drawn.npz"))


@pytest.mark.processes
@pytest.mark.parametrize("experiment", DRAW)
def test_generate_py_draws_what_sample_draws_without_this_project(experiment: str, runs: Path, tmp_path: Path) -> None:
    run = RunFolder(runs / experiment / "a")
    folder.publish(run, None, "mit", tmp_path / "model", print)
    drawn = dict(np.load(run.samples / "s" / "samples.npz"))
    asked = ASKED if experiment == "1d-classes" else ()
    found = generated(tmp_path / "model", len(drawn["arr_0"]) - 3, tmp_path, *asked)
    assert found.keys() == drawn.keys() == ({"arr_0", "arr_1"} if "classes" in experiment else {"arr_0"})
    for name, array in found.items():
        assert array.dtype == drawn[name].dtype
        assert np.array_equal(array, drawn[name][:-3])
    for step, name in ((3, "ema"), (1, "weak")) if "classes" not in experiment else ((3, "ema"),):
        weights = run.checkpoints / f"step-{step:08d}" / "ema.safetensors"
        assert sha256(tmp_path / "model" / f"{name}.safetensors") == sha256(weights)


@pytest.mark.processes
def test_the_card_says_what_the_model_is(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(runs / "mnist-small" / "a")
    samples = run.samples / "s"
    protocol = {
        "version": 5,
        "experiment": "mnist-small",
        "samples": {
            "num_samples": 70,
            "sampler": {"sampler": "ddim", "steps": 2},
            "seed": 0,
            "classes": [0, 1],
            "guidance": 1.5,
        },
        "sha256": {"samples": sha256(samples / "samples.npz")},
    }
    metric = {"label": "Frechet | distance", "value": 1.25, "low": 1.0, "high": 1.5, "floor": 0.0}
    metrics = {"frechet": {**metric, "floor_low": 0.1, "floor_high": 0.2}}
    write_json(samples / "metrics.json", {"protocol": protocol, "metrics": metrics, "num_judged": 6})
    folder.publish(run, 3, "cc-by-4.0", tmp_path / "model", print)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "cc-by-4.0"
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("Frechet | distance", 1.25)
    flags = "--model.dim 8 --train.batch-size 4 --train.grad-shards 1 --train.seed 7 --train.steps 3"
    assert f"| command | `python launch.py train mnist-small {flags}` |" in card.text
    assert "Measured on the first 6 of 70 samples of\n`ddim` with 4 network evaluations and seed 0, of" in card.text
    assert r"| Frechet \| distance | 1.25 | 1 to 1.5 | 0.1 to 0.2 |" in card.text
    files = {path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")}
    assert {"ema.safetensors", "config.json", "generate.py", "samples.png", "sampling/unet.py"} < files
    for name in files - {"README.md"}:
        assert f"| `{name}` | `{sha256(tmp_path / 'model' / name)}` |" in card.text
    assert str(runs) not in card.text + (tmp_path / "model" / "config.json").read_text()
    # Numbers of other samples are not those of the model.
    write_json(samples / "metrics.json", {"protocol": {**protocol, "sha256": {"samples": "0"}}, "metrics": metrics})
    folder.publish(run, 3, "mit", tmp_path / "again", print)
    assert "Frechet" not in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.processes
def test_samples_of_other_weights_of_the_step_are_no_examples(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs / "1d" / "a", tmp_path / "runs" / "1d" / "a"))
    manifest = {**run.read_samples("s"), "precision": "auto"}  # of an earlier version
    write_json(run.samples / "s" / "manifest.json", manifest)
    folder.publish(run, 3, "mit", tmp_path / "model", print)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["seed"], config["precision"]) == (3, "fp32")  # the set's, and the run's
    write_json(run.samples / "s" / "manifest.json", {**manifest, "weights_sha256": 64 * "0"})
    said: list[str] = []
    folder.publish(run, 3, "mit", tmp_path / "again", said.append)
    assert "no samples of step 3 are there" in said[-1]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("experiment", "damaged"), [("1d", "samples.npz"), *((name, "shard-00000.npy") for name in DRAW)]
)
def test_a_set_that_has_changed_is_published_after_the_command_that_draws_it_again(
    experiment: str, damaged: str, runs: Path, tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(runs / experiment / "a", tmp_path / "runs" / experiment / "a"))
    if (run.samples / "newer").exists():
        shutil.rmtree(run.samples / "newer")
    path = run.samples / "s" / damaged
    before, manifest = path.read_bytes(), (run.samples / "s" / "manifest.json").read_bytes()
    path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    refused = launch("export", f"{experiment}/a", "model", cwd=tmp_path)
    assert refused.code == 2 and not (tmp_path / "model").exists()
    said = " ".join(refused.err.split())
    assert f"{damaged} has changed since it was written; draw it again with: python launch.py sample" in said
    done(*shlex.split(said.rpartition("launch.py ")[2]), cwd=tmp_path, **NO_FIGURES)
    assert path.read_bytes() == before
    assert (run.samples / "s" / "manifest.json").read_bytes() == manifest
    done("export", f"{experiment}/a", "model", cwd=tmp_path)


@pytest.mark.processes
def test_a_set_whose_weak_weights_are_gone_is_no_example(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs / "1d" / "a", tmp_path / "runs" / "1d" / "a"))
    shutil.rmtree(run.checkpoints / "step-00000001")
    said: list[str] = []
    folder.publish(run, 3, "mit", tmp_path / "model", said.append)
    assert said[0].startswith(
        "The samples s are left out: the checkpoint of step 1, which guides these samples, is gone"
    )
    assert not (tmp_path / "model" / "weak.safetensors").exists()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["autoguidance"] is None


@pytest.mark.processes
def test_a_set_that_cannot_be_described_is_no_example(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs / "1d" / "a", tmp_path / "runs" / "1d" / "a"))
    (run.samples / "older").mkdir()
    (run.samples / "older" / "samples.npz").touch()
    write_json(run.samples / "older" / "manifest.json", {"num_samples": 5, "complete": True, "sampler": "ddpm"})
    said: list[str] = []
    folder.publish(run, 3, "mit", tmp_path / "model", said.append)
    assert said[0].startswith("The samples older are left out: ") and "a set of samples of this version" in said[0]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["seed"] == 3  # that of the other set


@pytest.mark.processes
def test_a_compiled_set_is_an_example_if_there_is_no_other(runs: Path, tmp_path: Path) -> None:
    """Because the published program does not draw its bytes."""
    run = RunFolder(shutil.copytree(runs / "1d" / "a", tmp_path / "runs" / "1d" / "a"))
    shutil.copytree(run.samples / "s", run.samples / "newer")
    write_json(run.samples / "newer" / "manifest.json", {**run.read_samples("s"), "compile": True, "seed": 8})
    folder.publish(run, 3, "mit", tmp_path / "model", print)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["seed"] == 3
    assert "compiled" not in (tmp_path / "model" / "README.md").read_text()
    shutil.rmtree(run.samples / "s")
    folder.publish(run, 3, "mit", tmp_path / "again", print)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["seed"] == 8
    said = "compiled, which `generate.py` is not, so its samples differ by rounding"
    assert (
        f"in fp32, with autoguidance 1.5 by the weights of step 1; {said}"
        in (tmp_path / "again" / "README.md").read_text()
    )


def test_a_folder_with_something_in_it_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    refused = launch("export", "1d/a", tmp_path / "full", cwd=runs.parent)
    assert refused.code == 2 and "exists and is not an empty folder; choose another one" in refused.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    made = done("export", "1d/a", tmp_path / "new", "--license", "mit", cwd=runs.parent, plain=True)
    assert "README.md is the card" in made.out
    assert json.loads((tmp_path / "new" / "config.json").read_text())["sampler"]["sampler"] == "ddpm"
    assert "export" in done("--help", cwd=tmp_path).out


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--num-samples", "0", "must be at least 1; got 0"),
        ("--seed", "-1", "must lie between 0 and 2^63 - 1; got -1"),
        ("--seed", str(2**63), f"must lie between 0 and 2^63 - 1; got {2**63}"),
        ("--device", "foo", "must be a device that torch can use here; got foo"),
        ("--device", "cuda:77", "must be a device that torch can use here; got cuda:77"),
        ("--device", "meta", "must be a device that torch can use here; got meta"),
        ("--out", "foo", "must end in .npz; got foo"),
        ("--out", "nowhere/x.npz", "must be a file in a folder that can be written to; got nowhere/x.npz"),
    ],
)
def test_a_published_model_refuses_what_it_cannot_draw_or_write(
    flag: str,
    value: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_json(tmp_path / "config.json", {"seed": 0, "num_classes": 0})
    monkeypatch.setattr(sys, "argv", ["generate.py", flag, value])
    with pytest.raises(SystemExit, match="2"):
        drawing.arguments(tmp_path)
    assert f"argument {flag}: {words}" in capsys.readouterr().err


@pytest.mark.processes
def test_a_published_model_refuses_classes_as_sample_does(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.publish(RunFolder(runs / "1d-classes" / "a"), None, "mit", tmp_path / "model", print)
    for flags, words in (("--classes 2", "--classes must lie between 0 and 1; got 2"), ("--guidance nan", "finite")):
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags.split()])
        with pytest.raises(SystemExit, match="2"):
            drawing.arguments(tmp_path / "model")
        assert words in capsys.readouterr().err
    flags = ("--guidance", "1e300", "--device", "cpu", "--out", tmp_path / "drawn.npz")
    command = [sys.executable, tmp_path / "model" / "generate.py", *flags]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: what the network draws here is not finite, so nothing is written\n"
    assert not (tmp_path / "drawn.npz").exists()
    assert "of classes 0-1 in turn with guidance 1" in (tmp_path / "model" / "README.md").read_text()
