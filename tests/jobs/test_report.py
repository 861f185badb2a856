"""`report`: one page that says what the run's folder says, shows it in a browser, and gives nothing away."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands.report import Report
from diffusion.errors import UserError
from jobs.files import write_json
from jobs.report import contents, curves, page
from jobs.report.curves import Point
from jobs.storage import faults
from jobs.storage.records import append_timing
from jobs.storage.run_folder import RunFolder
from tests.launching import done, launch, sentence
from tests.old_runs import ARCHIVES, unpack

EVIL = "<script>alert(1)</script>"
METRIC = {"label": "W1 to the exact mixture", "value": 0.0181, "low": 0.009, "high": 0.03, "better": "lower"}
FLOORS = {"floor": 0.01, "floor_low": 0.006, "floor_high": 0.031}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of an earlier version: interrupted, with a set of samples, without pictures and evaluation."""
    return RunFolder(unpack(ARCHIVES[0], "1d", tmp_path / "runs", tmp_path))


class Page(HTMLParser):
    """What a browser reads in a page: its texts outside of scripts and styles, its elements, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self._texts: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self._texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self._texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


def shown(*runs: RunFolder) -> Page:
    return Page(page.render(runs, {}))


def evaluate(run: RunFolder) -> None:
    """Gives the run's samples the results of an evaluation, and a picture."""
    folder = run.samples / "before"
    version = run.read_experiment()[1].data.metrics_version
    drawn = run.read_samples("before")
    hashes, samples = {"samples": drawn["sha256"]["samples.npz"]}, {"num_samples": drawn["num_samples"]}
    protocol = {"version": version, "samples": samples, "sha256": hashes, "weights_are_there": True, "experiment": "1d"}
    table = {"title": "By sampler", "rows": [{"sampler": "heun", "evaluations": 20}]}
    results = {
        "protocol": protocol,
        "metrics": {"w1": {**METRIC, **FLOORS}},
        "tables": {"samplers": table},
        "num_judged": 6,
    }
    (folder / "metrics.json").write_text(json.dumps(results))
    Image.new("RGB", (40, 30), "white").save(folder / "grid.png")


def test_the_page_says_what_the_folder_says(run: RunFolder) -> None:
    evaluate(run)
    text = shown(run).text
    launched, status = run.read_launch(), run.read_status()
    assert f"python launch.py {' '.join(launched['argv'][1:])}" in text
    assert f"{status['step']:,} of {status['total']:,}" in text
    assert launched["git_commit"] in text
    assert f"torch {launched['versions']['torch']}" in text
    assert "W1 to the exact mixture 0.018 * 0.009 to 0.030 0.006 to 0.031" in text
    assert "sampler evaluations heun 20" in text
    assert f"Measured on the first 6 of {run.read_samples('before')['num_samples']:,} samples." in text
    manifest = json.loads((run.checkpoints / "step-00001253" / "manifest.json").read_text())
    assert manifest["files"]["ema.safetensors"]["sha256"] in text
    assert run.read_samples("before")["sha256"]["samples.npz"] in text
    assert "train.batch-size" in text


def test_the_curves_are_those_of_the_files(run: RunFolder) -> None:
    append_timing(run, {"event": "progress", "step": 1253, "images_per_s": 5000.0, "checkpoint_s": 0.0})
    content = contents.read(run, {}, 100)
    figures = curves.of_run(content, 1200)
    assert figures["Images per second"].renderers[0].data_source.data["value"] == [5000.0]
    assert [title.partition(":")[0] for title in figures] == [
        "Training loss",
        "Excess loss",
        "Loss by noise level",
        "Norm of the gradient before clipping",
        "Learning rate",
        "Images per second",
    ]
    drawn = figures["Training loss"].renderers[0].data_source.data
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = np.array([line["loss"] for line in lines])
    assert list(drawn["step"]) == [line["step"] for line in lines]
    assert drawn["value"] == pytest.approx(losses)
    width = len(losses) // 20
    assert drawn["mean"][-1] == pytest.approx(losses[-width:].mean())
    assert drawn["mean"][width // 2] == pytest.approx(losses[: width // 2 + 1].mean())
    (floor,) = [item.location for item in figures["Training loss"].center if hasattr(item, "location")]
    assert floor == content.machine["loss_floor"]
    excess = figures[next(title for title in figures if title.startswith("Excess"))].renderers[0].data_source.data
    assert excess["value"] == pytest.approx(losses - floor, abs=1e-6)


def test_the_held_out_loss_lies_beside_the_training_loss(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines[2]["held_out_loss"], lines[5]["held_out_loss"] = 0.5, 0.25
    steps = range(
        lines[-1]["step"] + 1, lines[-1]["step"] + 41
    )  # that were not to be logged; enough for a running mean
    more = [2.0 ** -(i % 8) for i in range(40)]
    lines += [{"step": step, "held_out_loss": loss} for step, loss in zip(steps, more, strict=True)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.status.write_text(json.dumps({**run.read_status(), "held_out_loss": 0.125}))
    content = contents.read(run, {}, 100)
    figure = curves.of_run(content, 1200)["Training loss"]
    values, means, _, held_out, _ = (line.data_source.data for line in figure.renderers)
    assert len(values["value"]) == len(means["mean"]) == len(lines) - 40
    assert held_out["step"].tolist() == [lines[2]["step"], lines[5]["step"], *steps]
    assert held_out["value"].tolist() == held_out["mean"].tolist() == [0.5, 0.25, *more]
    other = RunFolder(shutil.copytree(run.path, run.path.with_name("other")))
    assert "Held-out loss of the averaged weights" in curves.compared([content, contents.read(other, {}, 100)])
    assert "held-out loss 0.1250" in shown(run).text


def test_a_set_of_classes_says_which(run: RunFolder) -> None:
    manifest = run.samples / "before" / "manifest.json"
    assert "guidance" not in shown(run).text
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": [0, 1, 2, 7], "guidance": 1.5}))
    assert "seed 0; classes 0-2+7 in turn, guidance 1.5." in shown(run).text
    guided = {"autoguidance": {"scale": 2.0, "step": 1000, "weights_sha256": "0"}}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **guided}))
    assert "guidance 1.5; autoguidance 2 by the weights of step 1,000." in shown(run).text


def test_a_long_curve_keeps_its_peaks() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[[12_345, 40_001]] = 9, -9
    whole = [Point(i, float(value), 0.0) for i, value in enumerate(values)]
    thinned = curves.thin(whole, 1000)
    assert len(thinned) <= 1000
    assert {whole[12_345], whole[40_001]} < set(thinned) <= set(whole)
    assert [point.step for point in thinned] == sorted(point.step for point in thinned)
    assert curves.thin(whole[:1000], 1000) == whole[:1000]


def test_what_a_run_does_not_have_has_no_section(run: RunFolder) -> None:
    whole = shown(run).text
    for path in (run.samples, run.checkpoints):
        shutil.rmtree(path)
    for path in (run.metrics, run.timing, run.status, run.path / "launch.json"):
        path.unlink()
    bare = shown(run).text
    for section in ("What was run", "Curves", "Samples:", "Where the time went", "Hashes"):
        assert section in whole and section not in bare
    assert "created" in bare  # its state
    assert "All settings" in bare


def test_figures_of_an_evaluation_stand_only_beside_the_samples_that_it_is_of(run: RunFolder) -> None:
    evaluate(run)
    folder = run.samples / "before"
    shutil.copy(folder / "grid.png", folder / "samplers.png")
    names = ["samples/before/grid.png", "samples/before/samplers.png"]

    def pictures() -> list[str]:
        return [entry.name for entry in contents.read(run, {}, 100).samples[0].pictures]

    assert pictures() == names
    drawn = run.read_samples("before")
    write_json(folder / "manifest.json", {**drawn, "sha256": {"samples.npz": 64 * "0"}})  # it has grown
    assert pictures() == names[:1]
    write_json(folder / "manifest.json", drawn)
    (folder / ".evaluation").mkdir()
    (folder / ".evaluation" / "undrawn").touch()  # evaluated again, where nothing could be plotted
    assert pictures() == names[:1]


@pytest.mark.parametrize("harm", [{"sha256": {}}, {"step": "20"}, {"sampler": "ddpm"}])
def test_a_set_that_cannot_be_described_is_left_out_and_named(harm: dict[str, Any], run: RunFolder) -> None:
    shutil.copytree(run.samples / "before", run.samples / "older")
    write_json(run.samples / "older" / "manifest.json", {**run.read_samples("before"), **harm})
    text = shown(run).text
    assert "Sets of samples that this version cannot describe, not shown here: older." in text
    assert "Samples: before" in text and "Samples: older" not in text


def test_a_failure_is_shown_and_what_others_wrote_is_text_and_no_page(run: RunFolder) -> None:
    harmless = shown(run).tags.count("script")
    trace = f"Traceback:\nRuntimeError: {EVIL} at http://me:SECRET@server"
    run.status.write_text(json.dumps({**run.read_status(), "state": "failed", "failed_rank": 0, "traceback": trace}))
    run.update_launch(argv=["/x/launch.py", "train", "1d", "--data.root", "http://me:SECRET@server", EVIL])
    run.update_launch(git_diff=f"diff --git a/jobs/files.py b/jobs/files.py\n+SECRET = {EVIL}\n", host=EVIL)
    again = faults.Fault(time="2026-01-01T00:00:00+00:00", cause=f"hung: {EVIL}", node=EVIL, checkpoint=5, again=True)
    (run.path / "faults.jsonl").write_text(json.dumps(vars(again)) + "\n")
    odd = run.path.with_name(EVIL.replace("/", "\\"))
    run.path.rename(odd)
    written = page.render([RunFolder(odd)], {})
    found = Page(written)
    assert found.tags.count("script") == harmless
    assert f"RuntimeError: {EVIL} at http://server" in found.text
    assert f"hung: {EVIL}; tried again 5 {EVIL}" in found.text
    assert "jobs/files.py" in found.text
    assert "SECRET" not in written


def test_the_page_needs_no_network_and_holds_no_file_of_elsewhere(run: RunFolder) -> None:
    evaluate(run)
    private = run.path.parent / "private.png"
    Image.new("RGB", (40, 30), "red").save(private)
    (run.samples / "before" / "other.png").symlink_to(private)
    assert [entry.name for entry in contents.read(run, {}, 100).samples[0].pictures] == ["samples/before/grid.png"]
    assert contents.outside(run) == ["samples/before/other.png"]
    written = page.render([run], {})
    loaded = Page(written).loaded
    assert [name.partition(":")[0] for name in loaded] == ["data"]
    assert "default-src 'none'" in written
    assert len(written) < 3e6


def test_runs_are_compared(run: RunFolder) -> None:
    other = RunFolder(run.path.with_name("other"))
    shutil.copytree(run.path, other.path)
    evaluate(run)
    settings = json.loads((other.path / "experiment.json").read_text())
    settings["train"]["lr"] = 0.125
    (other.path / "experiment.json").write_text(json.dumps(settings))
    found = [contents.read(entry, {}, 100) for entry in (run, other)]
    assert page.differing(found) == {"train.lr": [found[0].config.train.lr, 0.125]}
    rows, floor = page.measured(found)["W1 to the exact mixture"]
    assert ([row and row.value for row in rows], floor) == (["0.018", None], "0.006 to 0.031")
    together = curves.compared(found)["Training loss"]
    assert [item.label.value for item in together.legend[0].items] == ["1d/old", "1d/other"]
    hovered = together.renderers[-1].data_source.data
    means = [point.mean for point in curves.points(found[0].history, "loss")]
    assert hovered["c0"] == pytest.approx(means) and hovered["c1"] == pytest.approx(means)
    text = shown(run, other).text
    assert "2 runs compared" in text and "Evaluations side by side" in text
    assert "A lower loss means nothing" not in text
    settings["train"]["noise_levels"] = [0.1, 0.9]
    settings["diffusion"]["beta_schedule"] = "cosine"
    (other.path / "experiment.json").write_text(json.dumps(settings))
    same_name = shutil.copytree(run.path, run.path.parent.parent.parent / "elsewhere" / "1d" / "old")
    text = shown(run, other, RunFolder(same_name)).text
    assert (
        "A lower loss means nothing between runs that differ in diffusion.beta-schedule, train.noise-levels: " in text
    )
    assert f"{same_name} interrupted" in text
    with pytest.raises(UserError, match="given twice"):
        page.render([run, run], {})


def test_a_sweep_stands_for_its_runs(run: RunFolder, tmp_path: Path) -> None:
    for name in ("s-000", "s-001"):
        copy = RunFolder(shutil.copytree(run.path, run.path.with_name(name)))
        copy.update_launch(sweep="s", point={})
    assert Report(runs=("s",), out=tmp_path / "s.html", runs_dir=tmp_path / "runs")() == 0
    assert "2 runs compared" in (tmp_path / "s.html").read_text()


def test_the_command_writes_the_page_whole_or_not_at_all(run: RunFolder, tmp_path: Path) -> None:
    assert done("report", "1d/old", cwd=tmp_path, plain=True).out == "runs/1d/old/report.html\n"
    assert Page((run.path / "report.html").read_text()).text.count("1d/old")
    run.figures.mkdir(exist_ok=True)
    (run.figures / "x.png").symlink_to("/x.png")
    assert "because links lead out of its folder: figures/x.png" in sentence(done("report", "1d/old", cwd=tmp_path).out)
    for arguments, reason in (
        ((), "report needs a RUN"),
        (("1d/nothing",), "there is no run '1d/nothing' in runs, which"),
        (("1d/old", "--out", "."), "--out names the page itself"),
        (("1d/old", "--out", "nowhere/a.html"), "nowhere is none"),
    ):
        ended = launch("report", *arguments, cwd=tmp_path)
        assert ended.code == 2 and reason in sentence(ended.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_curves_and_has_nothing_to_complain_of(scheme: str, run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.render([run], {}))
    command: list[Any] = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--window-size=1200,2000"]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    picture = tmp_path / "page.png"
    command += [f"--screenshot={picture}", (tmp_path / "page.html").as_uri()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    complaints = [line for line in said.splitlines() if "CONSOLE" in line and "setting log level" not in line]
    assert complaints == []
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).astype(int)
    curve = np.array([int(curves.CURVE[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels - curve).max(axis=1) < 8).sum() > 1000
    assert np.median(pixels) > 200 if scheme == "light" else np.median(pixels) < 50
