"""Evaluations give the same numbers however they are run, go on after a kill, and refuse what they cannot judge."""

import json
import os
import random
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.errors import UserError
from diffusion.figures.quality import quality_lines
from diffusion.settings import SAMPLERS
from jobs.evaluate import report as report
from jobs.evaluate.job import EvaluateJob
from jobs.evaluate.plan import Evaluation, plan
from jobs.files import sha256
from jobs.sample.autoguidance import Autoguidance
from jobs.storage import faults
from jobs.storage.run_folder import RunFolder
from tests.launching import (
    NO_FIGURES,
    TINY,
    Finished,
    done,
    finish,
    launch,
    relatives,
    slowed,
    start,
    wait_until,
    workers,
)

SETS = {"few": ("dpm++", 300, 40), "more": ("ddim", 5000, 40), "early": ("ddim", 5000, 20)}
"""Sampler, number and checkpoint."""
SLOWLY = slowed("jobs.evaluate.units", "write_arrays", 1)
"""For an evaluation that is stopped before all of its units are done."""

pytestmark = pytest.mark.processes  # whose samples and evaluations all tests share


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny 1D run and its samples, of two checkpoints."""
    root = tmp_path_factory.mktemp("sampled")
    small = ("--train.steps", 40, "--train.checkpoint-every", 20, "--diffusion.timesteps", 30, "--name", "a")
    done("train", "1d", *TINY, *small, cwd=root, **NO_FIGURES)
    for name, (sampler, n, step) in SETS.items():
        drawn = ("--num-samples", n, "--sampler", sampler, "--steps", 10, "--checkpoint", step, "--name", name)
        done("sample", "1d/a", *drawn, cwd=root, **NO_FIGURES)
    return root


@pytest.fixture(scope="module")
def evaluated(sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with all sets evaluated by one process."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(sampled / "runs", root / "runs")
    done("evaluate", "1d/a/samples/more", "1d/a/samples/early", cwd=root)
    done("evaluate", "1d/a", "--samples", "few", cwd=root)
    return root


def planned(root: Path, name: str) -> Evaluation:
    return plan(RunFolder(root / "runs" / "1d" / "a"), name)


@pytest.fixture
def root(sampled: Path, tmp_path: Path) -> Path:
    shutil.copytree(sampled / "runs", tmp_path / "runs")
    return tmp_path


def folder(root: Path, name: str = "more") -> Path:
    return root / "runs" / "1d" / "a" / "samples" / name


def results(root: Path, name: str = "more") -> dict[str, bytes]:
    """All files but the one that tells of what has gone wrong."""
    files = (path for path in folder(root, name).iterdir() if path.is_file() and path.name != faults.FILE)
    return {path.name: path.read_bytes() for path in files}


def sentence(ended: Finished) -> str:
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    return " ".join(ended.err.split())


def test_only_images_are_asked_for_their_likelihood(evaluated: Path) -> None:
    with pytest.raises(UserError, match="--likelihood is for images, others always have it; got 1d"):
        plan(RunFolder(evaluated / "runs" / "1d" / "a"), "few", likelihood=True)


def test_any_number_of_processes_gives_the_same_numbers(root: Path, evaluated: Path) -> None:
    """Four here, and two in the test of a kill below."""
    done("evaluate", "1d/a", "--samples", "more", "--device", "cpu", "--gpus", 4, cwd=root)
    assert results(root) == results(evaluated)
    assert {"metrics.json", "samplers.png", "excess-loss.png"} < results(root).keys()


def test_a_killed_evaluation_goes_on_with_what_is_missing(root: Path, evaluated: Path) -> None:
    command = ("evaluate", "1d/a", "--samples", "more", "--device", "cpu", "--gpus", 2)
    process = start(*command, cwd=root, **SLOWLY)
    wait_until(lambda: len(list((root / "runs/1d/a").rglob("[!.]*-*.npz"))) >= 3)
    os.kill(random.Random(0).choice(workers(process)), signal.SIGKILL)
    assert finish(process).code != 0
    wait_until(lambda: not relatives(process))
    kept = (path for path in (root / "runs/1d/a").rglob(".evaluation/*-*.npz"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert before
    assert not (folder(root) / "metrics.json").exists()
    done(*command, cwd=root)
    assert results(root) == results(evaluated)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_ctrl_c_stops_it_between_two_steps(root: Path) -> None:
    process = start("evaluate", "1d/a", "--samples", "more", cwd=root, **SLOWLY)
    wait_until(lambda: any((root / "runs/1d/a").rglob("[!.]*-*.npz")))
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code == 130
    assert "Stopped. The same command computes what is missing." in ended.err
    assert "Traceback" not in ended.err


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
    samplers = [(name, steps) for name in SAMPLERS for steps in (10, 20)]
    assert sorted((row["sampler"], row["steps"]) for row in rows) == sorted(samplers)


def test_what_is_printed_fits_a_terminal(evaluated: Path) -> None:
    a, few, b = (planned(evaluated, name) for name in ("more", "few", "early"))
    for width in (80, 120):
        for text in (report.one(a, width), report.two(a, b, width), report.quality([a, few], width)):
            _, _, table = text.partition("\n\n")  # the first lines are of the folders' names
            assert max(map(len, table.splitlines())) <= width, text
            assert "W1" in text


def test_names_of_what_is_measured_are_never_cut(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "runs", tmp_path / "runs")
    few, name = planned(tmp_path, "few"), "bits per dimension of test digits that it has not seen, without a class"
    written = json.loads((few.folder / "metrics.json").read_text())
    written["metrics"]["kl"]["label"] = name
    (few.folder / "metrics.json").write_text(json.dumps(written))
    for text in (report.one(few, 80), report.two(few, few, 80)):
        lines = text.partition("METRIC")[2].splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("bits per dimension"))
        below = [line for line in lines[first + 1 : first + 4] if line.startswith("  ")]
        assert [word for word in " ".join([lines[first], *below]).split() if word in name.split()] == name.split()


def test_a_comparison_finds_the_earlier_checkpoint_worse_and_a_set_equal_to_itself(evaluated: Path) -> None:
    late, early = planned(evaluated, "more"), planned(evaluated, "early")
    shown = done("evaluate", "1d/a/samples/more", "1d/a/samples/early", "--json", cwd=evaluated)
    found = json.loads(shown.out)["differences"]
    assert found == report.differences(late, early)
    assert found["w1"]["verdict"] == found["excess_loss"]["verdict"] == "A"
    assert found["w1"]["low"] > 0
    assert report.differences(early, late)["w1"]["verdict"] == "B"
    assert all(entry["value"] == 0 and entry["verdict"] == "" for entry in report.differences(late, late).values())


def test_a_checkpoint_stands_for_its_newest_set(root: Path) -> None:
    run = RunFolder(root / "runs" / "1d" / "a")
    os.utime(run.samples / "more" / "manifest.json")
    found = {named: plan(run, None, checkpoint=named).samples.name for named in (20, 40, "best")}
    assert found == {20: "early", 40: "more", "best": "more"}  # whose held-out loss is the only one
    with pytest.raises(UserError, match=r"no complete set of samples of the checkpoint of step 7; .* --checkpoint 7"):
        plan(run, None, checkpoint=7)
    both = launch("evaluate", "1d/a", "--checkpoint", "best", "--samples", "few", cwd=root)
    assert "--checkpoint and --samples both choose the set" in sentence(both)


def test_all_sets_of_the_newest_weights_are_compared(evaluated: Path) -> None:
    os.utime(folder(evaluated) / "manifest.json")
    shown = done("evaluate", "1d/a", "--all", "--json", cwd=evaluated)
    assert {row["name"] for row in json.loads(shown.out)} == {"more", "few"}
    assert "Left out: early, which is of other weights" in shown.err
    assert (evaluated / "runs/1d/a/figures/quality.png").is_file()


def test_numbers_name_the_samples_that_they_rest_on(evaluated: Path, tmp_path: Path) -> None:
    """Fewer than were drawn, where there are not as many real ones."""
    shutil.copytree(evaluated / "runs", tmp_path / "runs")
    few, more = planned(tmp_path, "few"), planned(tmp_path, "more")
    assert "samples/few: 300 samples, dpm++-10" in report.one(few, 80)
    path = few.folder / "metrics.json"
    path.write_text(path.read_text().replace('"num_judged": 300', '"num_judged": 6'))
    assert "samples/few: the first 6 of 300 samples, dpm++-10" in report.one(few, 80)
    assert "A and B hold 6 and 5,000 samples" in report.two(few, more, 200)
    assert "were not drawn in the same way: dpm++-10; ddim-10." in report.two(few, more, 200)
    assert "the same way" not in report.two(few, few, 200)
    assert report.quality([few], 80).splitlines()[1].split()[:3] == ["dpm++", "10", "6"]


def test_guidance_takes_two_evaluations_and_is_drawn_over_where_steps_are_equal(evaluated: Path) -> None:
    def at(name: str, guidance: float, steps: int = 10) -> Evaluation:
        found = planned(evaluated, name)
        settings = found.samples.settings
        sampler = replace(settings.sampler, steps=steps)
        return replace(
            found, samples=replace(found.samples, settings=replace(settings, sampler=sampler, guidance=guidance))
        )

    sets = [at("few", scale) for scale in (3, 1.5, 1, 0)]
    rows = report.quality_rows(sets)
    assert [(row["guidance"], row["evaluations"]) for row in rows] == [(0, 10), (1, 10), (1.5, 20), (3, 20)]
    assert quality_lines(rows) == ("guidance", {("dpm++", None): rows})
    assert "most network evaluations (EVALS) of the guidance nearest to 1" in report.quality(sets, 200)
    over, lines = quality_lines(report.quality_rows([*sets[1:3], at("few", 1, 30), at("more", 1)]))
    found = {line: [row["evaluations"] for row in own] for line, own in lines.items()}
    assert (over, found) == ("evaluations", {("ddim", 1): [10], ("dpm++", 1): [10, 30], ("dpm++", 1.5): [20]})


def test_autoguided_sets_are_another_line_and_take_two_evaluations(evaluated: Path) -> None:
    plain = planned(evaluated, "few")
    settings = replace(plain.samples.settings, autoguidance=Autoguidance(2.0, 10, "sha256"))
    guided = replace(plain, samples=replace(plain.samples, settings=settings))
    rows = report.quality_rows([guided, plain])
    assert [(row["way"], row["evaluations"]) for row in rows] == [("dpm++", 10), ("dpm++, auto 2", 20)]
    assert report._reference(rows)["way"] == "dpm++"  # although it has fewer evaluations
    over, lines = quality_lines(rows)
    assert (over, [*lines]) == ("evaluations", [("dpm++", None), ("dpm++, auto 2", None)])
    assert "dpm++, auto 2 20 300" in " ".join(report.quality([guided, plain], 80).split())
    assert "the same way: dpm++-10; dpm++-10, autoguidance 2 by step 10." in report.two(plain, guided, 200)
    other = replace(settings, autoguidance=Autoguidance(2.0, 20, "sha256"))
    rows = report.quality_rows([guided, replace(plain, samples=replace(plain.samples, settings=other))])
    assert {row["way"] for row in rows} == {"dpm++, auto 2 by 10", "dpm++, auto 2 by 20"}


def test_a_metric_without_an_interval_is_shown_and_not_judged(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "runs", tmp_path / "runs")
    sets = [planned(tmp_path, name) for name in ("few", "more")]
    for evaluation in sets:
        written = json.loads((evaluation.folder / "metrics.json").read_text())
        written["metrics"]["kl"] |= {"low": None, "high": None}
        (evaluation.folder / "metrics.json").write_text(json.dumps(written))
    rows = report.quality_rows(sets)
    assert [row["as_reference"]["kl"] for row in rows] == [None, None]
    assert rows[-1]["as_reference"]["ks"] is True
    assert "KL" in report.quality(sets, 120).splitlines()[0]


def test_results_of_an_earlier_version_are_kept_beside_the_new_ones(evaluated: Path, tmp_path: Path) -> None:
    """Their checkpoint may be gone, so that not all of them could be computed again."""
    shutil.copytree(evaluated / "runs", tmp_path / "runs")
    evaluation = planned(tmp_path, "few")
    path, replicates = evaluation.folder / "metrics.json", evaluation.read_replicates()
    new = path.read_text()
    results = {name: value for name, value in evaluation.read().items() if name != "protocol"}
    old = new.replace(f'"version": {evaluation.protocol["version"]}', '"version": 0')
    path.write_text(old)
    for _ in range(2):  # the second time replaces results of the same version
        evaluation.write(results, replicates)
        assert path.read_text() == new
        assert [(kept.name, kept.read_text()) for kept in evaluation.folder.glob("metrics-*")] == [
            ("metrics-version-0.json", old)
        ]


def test_samples_without_their_checkpoint_are_judged_by_themselves(root: Path, evaluated: Path) -> None:
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints" / "step-00000040")
    shown = done("evaluate", "1d/a", "--samples", "more", cwd=root)
    assert "checkpoint that drew these samples is gone" in " ".join(shown.out.split())
    own, known = (json.loads(results(each)["metrics.json"])["metrics"] for each in (root, evaluated))
    assert own == {name: known[name] for name in ("w1", "ks", "kl", "share_0", "share_1")}


def test_a_run_without_samples_names_the_command_that_draws_them(root: Path) -> None:
    with pytest.raises(UserError, match=r"must name a complete set of .* \(it has .*few.*\); got x"):
        planned(root, "x")
    assert "--all takes one RUN" in sentence(launch("evaluate", "1d/a", "1d/a", "--all", cwd=root))
    shutil.rmtree(root / "runs" / "1d" / "a" / "samples")
    assert "python launch.py sample runs/1d/a --num-samples" in sentence(launch("evaluate", "1d/a", cwd=root))


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
    with pytest.raises(UserError, match=re.escape(words)):
        planned(root, "more")


def test_samples_that_are_not_those_that_were_drawn_are_refused(root: Path) -> None:
    np.savez(folder(root) / "samples.npz", np.zeros(5000, np.float32))
    assert "its sha256 differs" in sentence(launch("evaluate", "1d/a", "--samples", "more", cwd=root))
    assert not (folder(root) / ".evaluation").exists()


@pytest.mark.parametrize("recorded", [None, {}, {"shard-00000.npy": "0"}, [], "0"])
def test_samples_of_which_no_hash_is_known_are_judged_after_the_command_that_records_it(
    recorded: object, root: Path
) -> None:
    path = folder(root) / "manifest.json"
    before = path.read_bytes()
    manifest = {**json.loads(before), "sha256": recorded}
    if recorded is None:
        del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    refused = sentence(launch("evaluate", "1d/a", "--samples", "more", cwd=root))
    assert "its manifest.json names no sha256 of it; write it again with: python launch.py " in refused
    done(*shlex.split(refused.rpartition("launch.py ")[2]), cwd=root, **NO_FIGURES)
    assert path.read_bytes() == before
    assert planned(root, "more").protocol["sha256"]["samples"] == sha256(folder(root) / "samples.npz")


def test_constant_samples_get_the_right_numbers(root: Path) -> None:
    disturb(root, np.full(5000, 1.5, np.float32))
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints")  # which is faster
    evaluation = planned(root, "more")
    first, second = (EvaluateJob(evaluation, (share, 2), "cpu", merge=False) for share in (0, 1))
    left = first.left, second.left
    assert first() == 0  # without weights there is one unit, which is its
    assert first.left != left[0]
    assert second.left == left[1]  # so a share that was given up stays so, whatever others do
    assert second() == 0
    assert EvaluateJob(evaluation, (0, 1), "cpu", merge=True)() == 0
    found = evaluation.read()["metrics"]
    assert found["kl"]["value"] == pytest.approx(np.log(64))
    assert found["share_1"]["value"] == pytest.approx(1, abs=1e-3)
    assert [found["w1"][name] for name in ("low", "high")] == pytest.approx([found["w1"]["value"]] * 2)
