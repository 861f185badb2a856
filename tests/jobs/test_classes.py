"""Sets of samples of chosen classes: exact counts, labels, and the same bytes however they are drawn."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from commands.evaluate import Evaluate
from diffusion.settings import SamplerSettings, SettingsError
from jobs.sample.classes import label, parse
from jobs.sample.sample_set import SampleSettings
from jobs.storage.run_folder import SAMPLES_NAME, check_name
from tests.launching import NO_FIGURES, TINY, done, launch, sentence

SAMPLE = ("sample", "1d-classes/a", "--steps", "4")
RUN = Path("runs/1d-classes/a")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    # Two processes, whose bytes are those of one; that includes the classes that are left out.
    shards = ("--train.grad-shards", "2", "--train.steps", "40", "--device", "cpu")
    three = ("--data.means", "-2", "0", "2", "--data.stds", "1", "1", "1", "--data.weights", "0.3", "0.4", "0.3")
    for processes in (1, 2):
        where = ("--gpus", processes, "--name", "ab"[processes - 1])
        done("train", "1d-classes", *TINY, *three, *shards, *where, cwd=root, **NO_FIGURES)
    done("train", "1d", *TINY, "--train.steps", "2", "--name", "a", cwd=root, **NO_FIGURES)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def arrays(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(root / RUN / "samples" / name / "samples.npz") as found:
        return found["arr_0"], found["arr_1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.processes
def test_training_has_the_same_bytes_on_any_number_of_processes(trained: Path) -> None:
    a, b = (trained / "runs" / "1d-classes" / name for name in "ab")
    checkpoint = Path("checkpoints", "step-00000040")
    assert contents(a / checkpoint) == contents(b / checkpoint)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def test_sets_are_the_same_however_they_are_drawn(root: Path) -> None:
    asked = ("--num-samples", "70001", "--guidance", "2")
    for processes in (1, 2):
        where = ("--device", "cpu", "--gpus", processes, "--name", f"by-{processes}")
        done(*SAMPLE, *asked, *where, cwd=root)
    folder = root / RUN / "samples"
    whole = contents(folder / "by-1")
    assert whole == contents(folder / "by-2")
    x, classes = arrays(root, "by-1")
    assert np.array_equal(classes, np.arange(70001) % 3)  # a shard is no whole number of rounds
    assert len(np.unique(x)) > 65_000

    (folder / "by-1" / "shard-00001.npy").unlink()
    done(*SAMPLE, *asked, "--name", "by-1", cwd=root)
    assert contents(folder / "by-1") == whole

    done(*SAMPLE, "--num-samples", "10", "--guidance", "2", "--name", "few", cwd=root, **NO_FIGURES)
    assert np.array_equal(arrays(root, "few")[0], x[:10])


def test_classes_and_guidance_decide_over_the_samples(root: Path) -> None:
    for classes, guidance in (("0", "0"), ("1", "0"), ("0", "1.5"), ("1", "1.5"), ("1,0", "1.5")):
        done(*SAMPLE, "--num-samples", "50", "--classes", classes, "--guidance", guidance, cwd=root, **NO_FIGURES)

    def drawn(classes: str, guidance: str) -> np.ndarray:
        return arrays(root, f"step-00000040-dpm++-4-classes{classes}-guidance{guidance}-seed0")[0]

    assert np.array_equal(drawn("0", "0"), drawn("1", "0"))
    assert not np.array_equal(drawn("0", "1.5"), drawn("1", "1.5"))
    # A sample depends on its own class alone; the two go through the network side by side.
    both = drawn("1+0", "1.5")
    np.testing.assert_allclose(both[::2], drawn("1", "1.5")[::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[1::2], drawn("0", "1.5")[1::2], rtol=1e-4, atol=1e-5)


def test_sets_of_other_classes_are_left_out_of_a_comparison(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another distribution is their measure, and of some metrics there are none."""
    for name, classes in (("one", "1"), ("back", "2,1,0"), ("all", "0-2")):
        done(*SAMPLE, "--num-samples", "50", "--classes", classes, "--name", name, cwd=root, **NO_FIGURES)
    command = Evaluate(run=str(root / RUN), all=True)
    assert {evaluation.folder.name for evaluation in command._asked()} == {"all", "back"}
    assert capsys.readouterr().err == "Left out: one, which is of other classes\n"


def test_samples_that_are_not_finite_are_no_samples(root: Path) -> None:
    ended = launch(*SAMPLE, "--num-samples", "50", "--guidance", "1e300", "--name", "nan", cwd=root, **NO_FIGURES)
    assert ended.code == 1
    assert "50 of the 50 samples from 0 on are not finite: choose less guidance" in sentence(ended.err)
    assert "samples are in" not in ended.out
    assert not list((root / RUN / "samples" / "nan").glob("*.np[yz]"))


def test_other_classes_are_another_set_and_models_without_classes_have_none(root: Path) -> None:
    done(*SAMPLE, "--num-samples", "50", "--name", "kept", cwd=root, **NO_FIGURES)
    before = contents(root / RUN / "samples" / "kept")
    manifest = json.loads(before["manifest.json"])
    assert (manifest["classes"], manifest["guidance"]) == ([0, 1, 2], 1.0)
    changes = (("--classes", "0,2", "classes=0-2, not 0,2"), ("--guidance", "3", "guidance=1.0, not 3.0"))
    for flag, value, words in changes:
        refused = launch(*SAMPLE, "--num-samples", "50", "--name", "kept", flag, value, cwd=root)
        assert refused.code == 2
        assert f"samples kept were drawn with {words}; choose another --name" in sentence(refused.err)
    assert contents(root / RUN / "samples" / "kept") == before

    done("sample", "1d/a", "--num-samples", "50", "--steps", "4", "--name", "s", cwd=root, **NO_FIGURES)
    folder = root / "runs" / "1d" / "a" / "samples" / "s"
    assert not {"classes", "guidance"} & json.loads((folder / "manifest.json").read_text()).keys()
    with np.load(folder / "samples.npz") as found:
        assert found.files == ["arr_0"]


@pytest.mark.parametrize(
    ("run", "arguments", "words"),
    [
        ("1d-classes/a", ["--classes", "3"], "--classes must lie between 0 and 2; got 3"),
        ("1d-classes/a", ["--guidance", "-1"], "--guidance must be at least 0 and finite; got -1.0"),
        ("1d-classes/a", ["--guidance", "nan"], "--guidance must be at least 0 and finite; got nan"),
        ("1d/a", ["--classes", "0"], "--classes is for models that know classes (1d-classes"),
        ("1d/a", ["--guidance", "1"], "--guidance is for models that know classes (1d-classes"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    run: str, arguments: list[str], words: str, root: Path
) -> None:
    refused = launch("sample", run, *arguments, cwd=root)
    assert refused.code == 2
    assert words in sentence(refused.err)
    assert not list((root / "runs" / run / "samples").iterdir())


@pytest.mark.parametrize(
    ("text", "classes", "name"),
    [
        ("7", (7,), "7"),
        ("0-9", tuple(range(10)), "0-9"),
        ("3,5", (3, 5), "3+5"),
        ("8,0-2,9", (8, 0, 1, 2, 9), "8+0-2+9"),
    ],
)
def test_classes_on_the_command_line(text: str, classes: tuple[int, ...], name: str) -> None:
    assert parse(text, 10) == classes
    assert label(classes) == name


def test_a_set_whose_classes_no_file_name_can_list_is_told_from_others_by_a_hash() -> None:
    begin, end = "step-00000040-ddim-4-classes", "-guidance1.5-seed0"
    some = SampleSettings(
        step=40,
        weights="ema",
        weights_sha256="",
        sampler=SamplerSettings(sampler="ddim", steps=4),
        seed=0,
        precision="fp32",
        sub_batch_size=1,
        shard_size=1,
        classes=(0,),
        guidance=1.5,
    )
    for classes in (tuple(range(0, last, 2)) for last in range(100, 200)):
        listed, name = f"{begin}{label(classes)}{end}", replace(some, classes=classes).label
        if len(f".drawing-{listed}") <= 255:  # the longest name that a file of the set has
            assert name == listed
        else:
            assert name.startswith(f"{begin}{len(classes)}-hash") and name.endswith(end) and len(name) < 100
            other = replace(some, classes=(*classes[:-1], 999)).label
            assert name != other and check_name(other, SAMPLES_NAME)


@pytest.mark.parametrize("text", ["", "x", "-1", "3,", "9-0", "0-10", "1,1", "0-4,3", "1.5", "99999999999"])
def test_what_are_no_classes_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--classes"):
        parse(text, 10)
