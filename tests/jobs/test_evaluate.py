"""Evaluations give the same numbers however they are run, go on after a kill, and refuse what they cannot judge."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import evaluation_report as report
from jobs.evaluate_job import EvaluateJob
from jobs.evaluation import plan
from jobs.files import sha256
from jobs.run_folder import RunFolder
from tests.launching import TINY, Finished, done, finish, launch, relatives, start, wait_until, workers

SETS = {"few": ("dpm++", 300), "more": ("ddim", 5000)}
DRAWN = (("a", "more"), ("a", "few"), ("b", "more"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny 1D runs, a and b; a has two sets of samples, b one."""
    root = tmp_path_factory.mktemp("sampled")
    for name, steps in (("a", 200), ("b", 20)):
        small = ("--train.steps", steps, "--diffusion.timesteps", 30, "--name", name)
        done("train", "1d", *TINY, *small, cwd=root)
    for run, name in DRAWN:
        sampler, n = SETS[name]
        drawn = ("--num-samples", n, "--sampler", sampler, "--steps", 10, "--name", name)
        done("sample", f"1d/{run}", *drawn, cwd=root)
    return root


@pytest.fixture(scope="module")
def evaluated(sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with all sets evaluated by one process."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(sampled / "runs", root / "runs")
    done("evaluate", "1d/a", "--all", cwd=root)
    done("evaluate", "1d/b", cwd=root)
    return root


@pytest.fixture
def root(sampled: Path, tmp_path: Path) -> Path:
    shutil.copytree(sampled / "runs", tmp_path / "runs")
    return tmp_path


def folder(root: Path, name: str = "more") -> Path:
    return root / "runs" / "1d" / "a" / "samples" / name


def results(root: Path, name: str = "more") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder(root, name).iterdir() if path.is_file()}


def sentence(ended: Finished) -> str:
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    return " ".join(ended.err.split())


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_numbers(processes: int, root: Path, evaluated: Path) -> None:
    done("evaluate", "1d/a", "--samples", "more", "--device", "cpu", "--gpus", processes, cwd=root)
    assert results(root) == results(evaluated)
    assert {"metrics.json", "samplers.png", "excess-loss.png"} < results(root).keys()


def test_a_killed_evaluation_goes_on_with_what_is_missing(root: Path, evaluated: Path) -> None:
    command = ("evaluate", "1d/a", "--samples", "more", "--device", "cpu", "--gpus", 2)
    process = start(*command, cwd=root)
    wait_until(lambda: len(list((root / "runs/1d/a/samples").rglob("[!.]*-*.npz"))) >= 3)
    os.kill(random.Random(0).choice(workers(process)), signal.SIGKILL)
    assert finish(process).code != 0
    wait_until(lambda: not relatives(process))
    kept = (path for path in (root / "runs/1d/a/samples").rglob(".evaluation/*-*.npz"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert before
    assert not (folder(root) / "metrics.json").exists()
    done(*command, cwd=root)
    assert results(root) == results(evaluated)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_ctrl_c_stops_it_and_the_same_command_goes_on(root: Path, evaluated: Path) -> None:
    process = start("evaluate", "1d/a", "--samples", "more", cwd=root)
    wait_until(lambda: any((root / "runs/1d/a/samples").rglob("[!.]*-*.npz")))
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    done("evaluate", "1d/a", "--samples", "more", cwd=root)
    assert results(root) == results(evaluated)


def test_results_name_what_they_rest_on_and_are_not_computed_twice(evaluated: Path) -> None:
    first = results(evaluated)
    metrics = json.loads(first["metrics.json"])
    manifest = json.loads(first["manifest.json"])
    protocol = metrics["protocol"]
    assert protocol["samples"]["num_samples"] == 5000
    assert (
        protocol["sha256"]["samples"] == manifest["sha256"]["samples.npz"] == sha256(folder(evaluated) / "samples.npz")
    )
    assert protocol["sha256"]["weights"] == manifest["weights_sha256"]
    times = {path: path.stat().st_mtime_ns for path in folder(evaluated).iterdir()}
    shown = done("evaluate", "1d/a", "--samples", "more", "--json", cwd=evaluated)
    assert json.loads(shown.out) == metrics
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for metric in metrics["metrics"].values():
        assert metric["floor"] is not None
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
    rows = metrics["tables"]["samplers"]["rows"]
    samplers = [(name, steps) for name in ("ddpm", "ddim", "dpm++") for steps in (10, 20)]
    assert sorted((row["sampler"], row["steps"]) for row in rows) == sorted(samplers)


def test_what_is_printed_fits_a_terminal(evaluated: Path) -> None:
    a, few, b = (plan(RunFolder(evaluated / "runs/1d" / run), name) for run, name in DRAWN)
    for width in (80, 120):
        for text in (report.one(a, width), report.two(a, b, width), report.quality([a, few], width)):
            _, _, table = text.partition("\n\n")  # the first lines are of the folders' names
            assert max(map(len, table.splitlines())) <= width, text
            assert "W1" in text


def test_a_comparison_finds_the_worse_training_and_no_difference_of_a_run_to_itself(evaluated: Path) -> None:
    a, _, b = (plan(RunFolder(evaluated / "runs/1d" / run), name) for run, name in DRAWN)
    found = json.loads(done("evaluate", "1d/a/samples/more", "1d/b", "--json", cwd=evaluated).out)["differences"]
    assert found == report.differences(a, b)
    assert found["w1"]["verdict"] == found["excess_loss"]["verdict"] == "A"
    assert found["w1"]["low"] > 0
    assert report.differences(b, a)["w1"]["verdict"] == "B"
    assert all(entry["value"] == 0 and entry["verdict"] == "" for entry in report.differences(a, a).values())


def test_all_sets_are_compared_with_the_one_of_most_evaluations(evaluated: Path) -> None:
    rows = json.loads(done("evaluate", "1d/a", "--all", "--json", cwd=evaluated).out)
    assert {row["name"] for row in rows} == {"more", "few"}
    assert (evaluated / "runs/1d/a/figures/quality.png").is_file()


def test_samples_without_their_checkpoint_are_judged_by_themselves(root: Path, evaluated: Path) -> None:
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints" / "step-00000200")
    shown = done("evaluate", "1d/a", "--samples", "more", cwd=root)
    assert "checkpoint that drew these samples is gone" in " ".join(shown.out.split())
    own, known = (json.loads(results(each)["metrics.json"])["metrics"] for each in (root, evaluated))
    assert own == {name: known[name] for name in ("w1", "ks", "kl", "share_0", "share_1")}


def test_a_run_without_samples_names_the_command_that_draws_them(root: Path) -> None:
    shutil.rmtree(root / "runs" / "1d" / "b" / "samples" / "more")
    assert "python launch.py sample runs/1d/b --num-samples" in sentence(launch("evaluate", "1d/b", cwd=root))
    assert "--all takes one RUN" in sentence(launch("evaluate", "1d/a", "1d/b", "--all", cwd=root))
    run = RunFolder(root / "runs" / "1d" / "a")
    with pytest.raises(ValueError, match=r"must name a complete set of .* \(it has .*few.*\); got x"):
        plan(run, "x")


def disturb(root: Path, array: np.ndarray[Any, Any], **changes: Any) -> None:
    """Replaces the samples and makes the manifest agree, as somebody might who knows how."""
    path = folder(root) / "samples.npz"
    np.savez(path, array)
    manifest = json.loads((folder(root) / "manifest.json").read_text())
    manifest["sha256"]["samples.npz"] = sha256(path)
    (folder(root) / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("array", "changes", "words"),
    [
        (np.zeros(4999, np.float32), {}, "must hold float32 [5000]; got float32 [4999]"),
        (np.zeros(5000), {}, "must hold float32 [5000]; got float64 [5000]"),
        (np.zeros((5000, 1), np.float32), {}, "must hold float32 [5000]; got float32 [5000, 1]"),
        (np.zeros(1, np.float32), {"num_samples": 1}, "needs at least 2 samples; got 1"),
        (np.full(5000, np.nan, np.float32), {}, "samples must be finite; 5,000 of 5,000"),
        (np.array([None] * 5000), {}, "cannot be read"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(
    array: np.ndarray[Any, Any], changes: dict[str, Any], words: str, root: Path
) -> None:
    disturb(root, array, **changes)
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(RunFolder(root / "runs" / "1d" / "a"), "more")


def test_samples_that_are_not_those_that_were_drawn_are_refused(root: Path) -> None:
    np.savez(folder(root) / "samples.npz", np.zeros(5000, np.float32))
    assert "its sha256 differs" in sentence(launch("evaluate", "1d/a", "--samples", "more", cwd=root))
    assert not (folder(root) / ".evaluation").exists()


def test_constant_samples_get_the_right_numbers(root: Path) -> None:
    disturb(root, np.full(5000, 1.5, np.float32))
    run = RunFolder(root / "runs" / "1d" / "a")
    shutil.rmtree(run.checkpoints)  # which is faster
    assert EvaluateJob(plan(run, "more"), (0, 1), "cpu", merge=True)() == 0
    found = plan(run, "more").read()["metrics"]
    assert found["kl"]["value"] == pytest.approx(np.log(64))
    assert found["share_1"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["w1"]["low"] == found["w1"]["high"] == pytest.approx(found["w1"]["value"])
