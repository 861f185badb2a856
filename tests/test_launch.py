"""The command line: bad input ends with one sentence and exit code 2, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import launch as program
from commands import watch
from diffusion.errors import OutsideError, UserError
from diffusion.problems.mnist import MnistProblem
from jobs.experiments.experiment_json import MAY_CHANGE
from slurm import errors as slurm_errors
from slurm.profile import ONLY_IN_FILES, Profile
from tests.launching import (
    NO_FIGURES,
    ROOT,
    TINY,
    done,
    launch,
    sentence,
)

TWENTY = (*TINY, "--diffusion.timesteps", 21, "--train.steps", 20, "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "2d"], ["2d", "1d, 1d-classes, mnist, mnist-small"]),
        (["train", "1d", "--train.stps", "3"], ["--train.stps", "--train.steps"]),
        (["train", "1d", "--train.steps", "0"], ["train.steps must be at least 1", "0"]),
        (["train", "1d", "--train.steps", "-5"], ["train.steps must be at least 1", "-5"]),
        (["train", "1d", "--train.steps", "1e4"], ["--train.steps: it must be a whole number; got 1e4"]),
        (["train", "1d", "--train.lr", "1,5"], ["--train.lr: it must be a number; got 1,5"]),
        (["train", "1d", "--slurm.time-min", "2h"], ["it must be a whole number or as_it_was; got 2h"]),
        (["train", "1d", "--train.grad-shards", "x"], ["it must be a whole number or None; got x"]),
        (["train", "1d", "--train.batch-size", "0"], ["train.batch-size must be at least 1", "0"]),
        (["train", "1d", "--train.micro-batch-size", "8"], ["--train.micro-batch-size", "--train.grad-shards N"]),
        (["train", "1d", "--train.no-cuda-graph"], ["--train.cuda-graph never"]),
        (["train", "1d", "--train.lr", "nan"], ["train.lr must be positive and finite", "nan"]),
        (["train", "1d", "--train.lr", "inf"], ["train.lr must be positive and finite", "inf"]),
        (["train", "1d", "--train.lr", "-1"], ["train.lr must be positive and finite", "-1"]),
        (["train", "1d", "--train.seed", "-1"], ["train.seed must lie between 0 and 2^63 - 1", "-1"]),
        (["train", "1d", "--train.keep-checkpoints", "1"], ["train.keep-checkpoints must be at least 2", "1"]),
        (["train", "1d", "--data.weights", "0.5", "0.6"], ["data.weights must sum to 1", "0.6"]),
        (["train", "1d", "--data.means", "0", "1", "2"], ["must be equally long", "3, 2, 2"]),
        (["train", "1d", "--data.stds", "1", "-1"], ["data.stds must be positive", "-1"]),
        (["train", "1d", "--diffusion.timesteps", "20"], ["diffusion.timesteps must be more than 20", "20"]),
        (["train", "mnist", "--model.dim", "12"], ["model.dim must be a multiple of 8", "12"]),
        (["train", "mnist", "--model.dim-mults", "1", "2", "4", "8"], ["28x28", "1, 2, 4, 8"]),
        (["train", "1d", "--name=-x"], ["a name is made of letters", "-x"]),
        (["train", "1d", "--name", "a/b"], ["a name is made of letters", "a/b"]),
        (["train", "1d", "--name", "../b"], ["a name is made of letters", "../b"]),
        (["train", "1d", "--name", ""], ["a name is made of letters", "''"]),
        (["train", "1d", "--device", "cuda"], ["--device cuda needs a CUDA GPU"]),
        (["train", "1d", "--gpus", "2"], ["--gpus", "2", "--device cpu --gpus 2"]),
        (["train", "1d", "--gpus", "0"], ["--gpus must be at least 1", "0"]),
        (["train", "1d", "--cluster", "local", "--profile", "no-such"], ["--profile must be a TOML file", "no-such"]),
        (["train", "1d", "--cluster", "local", "--slurm.time-min", "0"], ["slurm.time-min must be at least 1", "0"]),
        (
            ["train", "1d", "--train.steps", "1", "--device", "cpu", "--gpus", "3"],
            ["multiple of the number of GPUs", "2048", "3"],
        ),
        (["train", "1d", "--tracking.project", "a/b"], ["tracking.project must have at most 128 characters", "a/b"]),
        (["audit", "1d/a", "--retries", "3"], ["--retries"]),
        (["drill", "--retries", "3"], ["--retries"]),
        (["resume", "nowhere"], ["the folder runs", "nowhere", "--runs-dir"]),
        (["resume", "nowhere", "--runs-dir", "/"], ["nowhere", "1d, 1d-classes, mnist, mnist-small"]),
        (["resume", "1d"], ["no run of 1d"]),
        (["resume", "1d", "--train.lr", "1e-3"], ["--train.lr is fixed", "train EXPERIMENT --train.lr"]),
        (["resume", "1d", "--model.dim_mults=1"], ["--model.dim-mults is fixed"]),
        (["resume", "1d", "--train.stps", "3"], ["--train.stps", "--train.steps"]),
        (["resume", "1d", "--lr", "1e-3"], ["--train.lr is fixed"]),
        (["train", "1d", "--batch_size", "3"], ["no --batch-size", "--train.batch-size"]),
        (["train", "1d", "first"], ["--name first"]),
        (["sample", "1d", "first"], ["sample takes one RUN, such as EXPERIMENT/NAME; got 1d and first"]),
        (["status", "--runs-dir", "/dev/null"], ["--runs-dir must be a folder", "/dev/null"]),
        (["sample", "1d/a"], ["1d/a"]),
        (["sample", "1d/a", "--checkpoint", "last"], ["--checkpoint: it must be a whole number or best or None"]),
    ],
)
def test_a_wrong_command_gets_one_sentence_and_writes_nothing(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: nothing is begun. The tests below start theirs."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
        "DIFFUSION_PROFILE": "",
        "MPLBACKEND": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    try:
        code: object = program.main()
    except SystemExit as end:  # tyro's
        code = end.code
    said = sentence(capsys.readouterr().err)
    assert code == 2, said
    for word in words:
        assert word in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_default_profile_is_named_by_a_local_run_too(tmp_path: Path) -> None:
    ended = launch("train", "1d", "--cluster", "local", cwd=tmp_path, DIFFUSION_PROFILE="no-such")
    assert ended.code == 2, ended
    assert "DIFFUSION_PROFILE must be a TOML file" in sentence(ended.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code"),
    [(UserError, 2), (OutsideError, 1), (slurm_errors.UserError, 2), (slurm_errors.SlurmError, 1)]
    + [(bug, None) for bug in (ValueError, RuntimeError, KeyError, OSError)],
)
def test_a_sentence_for_the_user_and_a_traceback_for_us(
    raised: type[Exception],
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def planted(*_: object) -> None:
        raise raised("planted here")

    monkeypatch.setattr(watch.run_folder, "find", planted)
    monkeypatch.setattr(sys, "argv", ["launch.py", "logs", "a"])
    if code is None:
        with pytest.raises(raised, match="planted here"):
            program.main()
    else:
        assert program.main() == code
        assert capsys.readouterr().err == "error: planted here\n"


@pytest.mark.parametrize("command", [("train", "images"), ("sync",), ("report",), ("status",)])
def test_no_help_shows_an_empty_default(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "(default: )" not in " ".join(sentence(done(*command, "--help", cwd=tmp_path).out).split())


def test_the_lines_of_a_help_are_as_long_as_the_terminal_is_wide(tmp_path: Path) -> None:
    """Though it is written in docstrings, whose lines end elsewhere."""
    shown = done("sample", "--help", cwd=tmp_path, COLUMNS="80").out.splitlines()
    indent = max(len(line) - len(line[1:].lstrip()) for line in shown if line.endswith("│"))
    texts = [line[indent:-1].strip() if line[1:indent].isspace() else "" for line in shown]
    for line, following in pairwise(texts):
        word = following.partition(" ")[0]
        short = word and len(line) + 1 + len(word) < 79 - indent
        assert not (line and short) or word.startswith("(default:"), (line, word)


def test_the_help_of_resume_says_what_settings_and_profile_say(tmp_path: Path) -> None:
    shown = " ".join(sentence(done("resume", "--help", cwd=tmp_path, COLUMNS="100").out).split())
    slurm = {f"slurm.{f.name.replace('_', '-')}": f.default for f in fields(Profile)}
    for name in ONLY_IN_FILES:
        del slurm[f"slurm.{name.replace('_', '-')}"]
    offered = set(re.findall(r"(?<= --)(?:train|tracking|data|slurm)\.[a-z-]+", shown))
    assert (
        offered == MAY_CHANGE | {"train.steps", "train.precision", "train.grad-shards", "train.compile"} | slurm.keys()
    )
    defaults = re.findall(r"--(slurm\.[a-z-]+) [^()]*\(default: the profile's(?:, or ([\w-]+))?\)", shown)
    assert dict(defaults) == {flag: "" if default is None else str(default) for flag, default in slurm.items()}
    assert "Memory of a job on each of its nodes, in GB; 0 is" in shown
    assert "`resume` takes a number alone" in shown
    refused = launch("resume", "1d/a", "--train.checkpoint-every", "often", cwd=tmp_path).err
    assert "as_it_was" in refused


def test_a_tilde_is_the_home_folder_also_where_the_shell_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--runs-dir=~/elsewhere"], ["--runs-dir", "~/elsewhere"]):
        ended = done("status", *arguments, cwd=tmp_path, HOME=str(tmp_path))
        assert ended.out == f"There are no runs in {tmp_path}/elsewhere.\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MNIST_ROOT", "~/digits")
    assert MnistProblem().absolute().root == f"{tmp_path}/digits"


def test_a_folder_that_is_deleted_under_the_users_feet(tmp_path: Path) -> None:
    command = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} {ROOT / 'launch.py'} resume 1d/a"
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    train = command.replace("resume 1d/a", "train 1d --dry-run --cluster local")
    ended = subprocess.run(["sh", "-c", train], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: the folder that you are in has been deleted; go to another one\n"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    ended = launch("sample", "stuff", cwd=tmp_path)
    assert ended.code == 2
    assert "experiment.json" in sentence(ended.err)
    (tmp_path / "stuff" / "experiment.json").write_text('{"experiment": "1d", "train": 3}')
    ended = launch("sample", "stuff", cwd=tmp_path)
    assert ended.code == 2
    assert "experiment.json" in sentence(ended.err)
    (tmp_path / "runs" / "1d" / "taken").mkdir(parents=True)
    ended = launch("train", "1d", "--name", "taken", cwd=tmp_path)
    assert ended.code == 2
    assert "no run folder" in sentence(ended.err)


@pytest.mark.parametrize(
    ("file", "content", "code", "words"),
    [
        ("status.json", '{"state": "of a later version"}', 0, ""),
        ("status.json", "", 0, ""),  # as a power cut may leave it
        ("status.json", '{"state": "fail', 2, "status.json is not JSON"),
        ("samples/s/.jobs.json", '["1"', 2, ".jobs.json is not JSON"),
        ("experiment.json", f'{{"experiment": {"9" * 5000}}}', 2, "experiment.json"),
    ],
)
def test_what_a_damaged_file_costs_is_one_sentence(
    file: str, content: str, code: int, words: str, tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    (tmp_path / "runs" / "1d" / "a" / file).write_text(content)
    command = ("sample", "1d/a", "--num-samples", 20, "--name", "s") if "samples" in file else ("resume", "1d/a")
    ended = launch(*command, "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    assert ended.code == code, ended
    assert words in sentence(ended.err)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a finished training and a set of ten samples."""
    root = tmp_path_factory.mktemp("trained")
    done("train", "1d", *TWENTY, "--name", "a", cwd=root, **NO_FIGURES)
    done("sample", "1d/a", "--num-samples", 10, "--name", "s", "--device", "cpu", cwd=root)
    return root / "runs"


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("precision", "auto", "must be bf16, tf32 or fp32; got auto"),
        ("grad-shards", "None", "must be a number; got None"),
    ],
)
def test_what_a_first_start_has_decided_is_not_forgotten(
    setting: str, value: str, rule: str, tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    before = (tmp_path / "runs" / "1d" / "a" / "experiment.json").read_bytes()
    ended = launch("resume", "1d/a", f"--train.{setting}", value, cwd=tmp_path)
    assert ended.code == 2
    assert rule in sentence(ended.err)
    assert (tmp_path / "runs" / "1d" / "a" / "experiment.json").read_bytes() == before


def test_resume_goes_back_to_none_and_leaves_what_it_is_not_told(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    file = tmp_path / "runs" / "1d" / "a" / "experiment.json"
    values = json.loads(file.read_text())
    values["train"] |= {"checkpoint_every": 7, "checkpoint_minutes": 3.0}
    file.write_text(json.dumps(values))

    def settled(*flags: object) -> list[int | float | None]:
        """Checkpoints of a run that goes on: after how many steps and minutes."""
        shown = done("resume", "1d/a", "--train.steps", 30, *flags, "--dry-run", "--device", "cpu", cwd=tmp_path).out
        train = json.JSONDecoder().raw_decode(shown)[0]["train"]
        return [train["checkpoint_every"], train["checkpoint_minutes"]]

    assert settled() == [7, 3.0]
    assert settled("--train.checkpoint-every", "None") == [None, 3.0]
    assert settled("--train.checkpoint-minutes", "None", "--train.checkpoint-every", 8) == [8, None]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    ended = launch("train", "1d", cwd=tmp_path)
    assert ended.code == 2
    assert "cannot be made: " in sentence(ended.err)
    assert "runs/1d: Not a directory" in sentence(ended.err)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_missing_and_cut_data_files_are_named_before_anything_is_written(tmp_path: Path, mnist_root: Path) -> None:
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    ended = launch("train", "mnist-small", cwd=tmp_path, MNIST_ROOT=str(tmp_path / "data"), **offline)
    assert ended.code == 2
    assert "train-images-idx3-ubyte" in sentence(ended.err)
    assert list(tmp_path.iterdir()) == []
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[: -100 if "t10k-labels" in path.name else None])
    ended = launch("train", "mnist-small", cwd=tmp_path, MNIST_ROOT=str(tmp_path / "data"))
    assert ended.code == 2
    assert "t10k-labels-idx1-ubyte" in sentence(ended.err)
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_holds_what_the_design_names(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "30", "--name", "a", cwd=tmp_path, WANDB_MODE="offline")
    done("sample", "1d", "--num-samples", "1000", cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    files = {"experiment.json", "launch.json", "metrics.jsonl", "timing.jsonl", "status.json", "log.txt"}
    assert names == files | {"checkpoints.jsonl", "code", "checkpoints", "figures", "samples", "wandb"}
    checkpoint = run / "checkpoints" / "step-00000030"
    assert sorted(os.listdir(checkpoint)) == ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.pt"]
    assert set(json.loads((checkpoint / "manifest.json").read_text())) == {"step", "files"}
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    bands = {f"loss_t{band}" for band in range(4)}
    assert set(line) == {"step", "loss", *bands, "lr", "grad_norm", "clipped", "ema_decay", "skipped"}
    assert line["step"] == 1
    samples = run / "samples" / "step-00000030-dpm++-30-seed0"
    assert sorted(os.listdir(samples)) == ["grid.png", "manifest.json", "samples.npz", "shard-00000.npy"]
    array = np.load(samples / "samples.npz")["arr_0"]
    assert array.shape == (1000,)
    assert array.dtype == np.float32
    assert np.array_equal(array, np.load(samples / "shard-00000.npy"))


def test_commands_on_a_run_as_a_user_starts_them(tmp_path: Path, trained: Path, no_plots: dict[str, str]) -> None:
    """Other tests may fork theirs from a process that has loaded torch (tests/warm.py).

    Trainings of tests/jobs/test_surroundings.py start as plainly, with figures and without.
    """
    shutil.copytree(trained, tmp_path / "runs")

    def command(*arguments: object, **env: str) -> str:
        return plainly(*arguments, cwd=tmp_path, **env)

    assert "step 30" in command("resume", "1d/a", "--train.steps", 30, "--device", "cpu", "--gpus", 2, **no_plots)
    assert "50 samples are in" in command("sample", "1d/a", "--num-samples", 50, "--device", "cpu", **no_plots)
    assert "W1 to the exact mixture" in command("evaluate", "1d/a", "--samples", "s", "--device", "cpu", **no_plots)
    assert "1d/a" in command("status")
    assert "Finished" in command("logs", "1d/a")
    assert "finished" in launch("cancel", "1d/a", cwd=tmp_path, plain=True).err


def test_the_other_commands_as_a_user_starts_them(tmp_path: Path, no_plots: dict[str, str]) -> None:
    sweep = ("sweep", "1d", *TWENTY, "--name", "s", "--grid", "train.seed=0")
    assert "Finished" in plainly(*sweep, cwd=tmp_path, **no_plots)
    assert "Python" in launch("doctor", cwd=tmp_path, plain=True).out
    drill = ("drill", "--kills", 1, "--steps", 40, "--device", "cpu")
    assert "Equal byte for byte" in plainly(*drill, cwd=tmp_path, **no_plots)


def plainly(*arguments: object, cwd: Path, **env: str) -> str:
    ended = done(*arguments, cwd=cwd, plain=True, **env)
    return ended.out + ended.err


@pytest.mark.processes
def test_a_command_without_plots_finds_what_the_environment_has_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On some machines the libraries lie in a folder of $PYTHONPATH."""
    (tmp_path / "library.py").touch()
    (tmp_path / "matplotlib.py").touch()  # as the real one may
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    env = {**os.environ, **request.getfixturevalue("no_plots")}
    for name, code in {"library": 0, "matplotlib": 1}.items():
        assert subprocess.run([sys.executable, "-c", f"import {name}"], env=env, check=False).returncode == code
