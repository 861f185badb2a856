"""Sweeps: every point of the grid is trained once, and shown by its loss."""

import json
import signal
from pathlib import Path

import pytest

from diffusion.errors import UserError
from jobs.experiments import experiment_json, grid
from jobs.experiments.table import EXPERIMENTS
from tests.launching import (
    NO_FIGURES,
    TINY,
    as_if_drawn,
    done,
    finish,
    launch,
    sentence,
    start,
    status,
    steps_logged,
    wait_until,
)

GRID = ("--grid", "train.lr=1e-3,4e-3", "train.seed=1")
COMMAND = (
    "sweep",
    "1d",
    *TINY,
    "--diffusion.timesteps",
    "21",
    "--train.steps",
    "30",
    "--name",
    "S",
    "--cluster",
    "local",
    *GRID,
)


KNOWN = experiment_json.flags(EXPERIMENTS["1d"].preset)


def test_a_grid_is_a_product() -> None:
    assert grid.points(["train.lr=1,2", "train.seed=0,1"], KNOWN) == [
        {"train.lr": "1", "train.seed": "0"},
        {"train.lr": "1", "train.seed": "1"},
        {"train.lr": "2", "train.seed": "0"},
        {"train.lr": "2", "train.seed": "1"},
    ]
    (point,) = grid.points(["train.batch_size=8", "data.means=-1 1"], KNOWN)
    assert grid.arguments(point) == [
        *("--train.batch-size", "8"),
        *("--data.means", "-1", "1"),
    ]


@pytest.mark.parametrize("axis", ["train.lr", "train.lr=", "=1,2", "train.lr=1,,2", "train.lr=1,--help", "train.lr=-h"])
def test_an_axis_that_is_none_is_refused(axis: str) -> None:
    with pytest.raises(UserError, match="--grid takes SETTING=VALUE"):
        grid.points([axis], KNOWN)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("help=x",), "settings that `train EXPERIMENT --help` shows, such as train.lr; got help"),
        (("train.foo=1",), "settings that `train EXPERIMENT --help` shows, such as train.lr; got train.foo"),
        (("train.batch_size=64", "train.batch-size=128"), "--grid must name each setting once; got train.batch-size"),
        (("train.lr=1e-3,0.001",), "--train.lr 1e-3 and --train.lr 0.001 are the same settings"),
        (("train.lr=1e-3,x",), "see launch.py train 1d --help"),
    ],
)
def test_a_grid_that_is_none_is_refused_and_writes_nothing(axes: tuple[str, ...], words: str, tmp_path: Path) -> None:
    ended = launch("sweep", "1d", *TINY, "--name", "S", "--cluster", "local", "--grid", *axes, cwd=tmp_path)
    assert ended.code == 2 and words in sentence(ended.err)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_trains_each_point_once_and_status_sorts_them(tmp_path: Path) -> None:
    done(*COMMAND, cwd=tmp_path, **NO_FIGURES)
    runs = [tmp_path / "runs" / "1d" / f"S-00{i}" for i in range(2)]
    as_if_drawn(runs[0])
    settings = [json.loads((run / "experiment.json").read_text())["train"] for run in runs]
    assert [(s["lr"], s["seed"]) for s in settings] == [(1e-3, 1), (4e-3, 1)]
    assert [status(run)["state"] for run in runs] == ["finished"] * 2
    shown = json.loads(done("status", "S", "--json", cwd=tmp_path).out)
    assert [entry["loss"] for entry in shown] == sorted(status(run)["loss"] for run in runs)
    assert shown[0]["point"].keys() == {"train.lr", "train.seed"}
    table = done("status", "S", cwd=tmp_path, COLUMNS="80").out
    assert "train.lr" in table.splitlines()[0]
    assert max(map(len, table.splitlines())) <= 80
    (runs[1] / "status.json").write_text(json.dumps({**status(runs[1]), "state": "interrupted"}))
    untouched = [(run / "status.json").stat().st_mtime_ns for run in runs if run != runs[1]]
    done(*COMMAND, cwd=tmp_path, **NO_FIGURES)
    assert status(runs[1])["state"] == "finished"
    assert [(run / "status.json").stat().st_mtime_ns for run in runs if run != runs[1]] == untouched
    as_if_drawn(runs[1])
    assert "finished or on their way" in done(*COMMAND, cwd=tmp_path).out


def test_losses_of_different_noise_levels_are_not_compared(tmp_path: Path) -> None:
    command = ("sweep", "1d", *TINY, "--diffusion.timesteps", "21", "--train.steps", "2", "--name", "S")
    done(*command, "--cluster", "local", "--grid", "train.noise-levels=0 1,None", cwd=tmp_path, **NO_FIGURES)
    shown = json.loads(done("status", "S", "--json", cwd=tmp_path).out)
    assert [entry["point"] for entry in shown] == [{"train.noise-levels": "0 1"}, {"train.noise-levels": "None"}]
    assert shown[0]["loss"] > shown[1]["loss"]  # an error of v is one of eps, over alpha
    files = [tmp_path / "runs" / "1d" / f"S-00{i}" / "experiment.json" for i in range(2)]
    second = json.loads(files[1].read_text())
    for schedule in ("linear", "cosine"):
        files[0].write_text(json.dumps({**second, "diffusion": {**second["diffusion"], "beta_schedule": schedule}}))
        losses = [entry["loss"] for entry in json.loads(done("status", "S", "--json", cwd=tmp_path).out)]
        assert (losses == sorted(losses)) == (schedule == second["diffusion"]["beta_schedule"])


def test_a_name_of_a_sweep_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for command in ("status", "report"):
        ended = launch(command, "**a/S", cwd=tmp_path)
        assert ended.code == 2 and "RUN is a run folder" in sentence(ended.err)


def test_ctrl_c_ends_the_whole_sweep(tmp_path: Path) -> None:
    endless = ("--train.steps", "1000000", "--name", "S", "--cluster", "local", "--grid", "train.seed=0,1")
    process = start("sweep", "1d", *TINY, *endless, cwd=tmp_path, **NO_FIGURES)
    first, second = (tmp_path / "runs" / "1d" / f"S-00{i}" for i in range(2))
    wait_until(lambda: steps_logged(first) > 10)
    process.send_signal(signal.SIGINT)
    assert finish(process, timeout_s=60).code == 130
    assert status(first)["state"] == "interrupted"
    assert not (second / "status.json").exists()


def test_a_sweep_goes_on_after_a_failed_run_and_says_in_the_end_that_one_has_failed(tmp_path: Path) -> None:
    diverging = ("--train.warmup-steps", "0", "--train.steps", "30", "--grid", "train.lr=1e30,1e-3")
    ended = launch("sweep", "1d", *TINY, "--name", "S", "--cluster", "local", *diverging, cwd=tmp_path, **NO_FIGURES)
    assert ended.code == 1
    runs = [tmp_path / "runs" / "1d" / f"S-00{i}" for i in range(2)]
    assert [status(run)["state"] for run in runs] == ["failed", "finished"]


def test_a_wrong_value_in_the_grid_writes_nothing(tmp_path: Path) -> None:
    ended = launch("sweep", "1d", "--name", "S", "--grid", "train.lr=1e-3,-1", cwd=tmp_path)
    assert ended.code == 2
    assert "train.lr must be positive and finite" in ended.err
    assert list(tmp_path.iterdir()) == []
