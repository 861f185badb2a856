"""What `status` says of runs: true whatever status.json says, quick, and 80 columns wide."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from jobs.experiments.experiment_json import write
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import ownership
from jobs.storage.run_folder import RunFolder, State, find
from jobs.watch import detail, listing, states, sweep
from slurm.queue import JobState
from tests.launching import NO_FIGURES, TINY, done, finish, launch, start, status, steps_logged, wait_until

ENDLESS = ("train", "1d", *TINY, "--train.steps", "1000000", "--device", "cpu")


@dataclass(frozen=True)
class Runs:
    """A folder of all runs, in which a test makes runs by hand."""

    folder: Path

    def make(self, name: str, age_s: float = 3600, jobs: tuple[str, ...] = (), **status: Any) -> RunFolder:
        run = RunFolder(self.folder / "mnist" / name)
        run.path.mkdir(parents=True)
        moment = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="milliseconds")
        (run.path / "experiment.json").write_text(write("mnist", EXPERIMENTS["mnist"].preset))
        launched = {"created": moment, "host": os.uname().nodename, "job_ids": jobs}
        (run.path / "launch.json").write_text(json.dumps(launched))
        if status:
            run.status.write_text(json.dumps({"step": 7, "total": 40_000, "updated": moment, **status}))
        return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunFolder]:
    return Runs(tmp_path / "runs").make


def seen(run: RunFolder, jobs: dict[str, JobState] | None = None) -> tuple[str, str]:
    found = states.summarize(run, {} if jobs is None else jobs)
    return found.state, found.reason


@pytest.mark.parametrize(
    ("written", "slurm", "expected"),
    [
        ("running", JobState("RUNNING", nodes="n1"), ("running", "silent for 60 min")),
        ("queued", JobState("PENDING", "Resources"), ("queued", "Resources")),
        ("queued", JobState("RUNNING"), ("running", "starting")),
        ("requeued", JobState("PENDING", "BeginTime"), ("requeued", "BeginTime")),
        # The node is gone, and Slurm itself has queued the job again.
        ("running", JobState("PENDING", "BeginTime"), ("requeued", "BeginTime")),
        ("cancelled", JobState("PENDING", "BeginTime"), ("requeued", "BeginTime")),
        ("running", JobState("OUT_OF_MEMORY", signal="SIGKILL"), ("failed", "OUT_OF_MEMORY")),
        ("running", JobState("NODE_FAIL"), ("failed", "NODE_FAIL")),
        ("running", JobState("TIMEOUT"), ("failed", "TIMEOUT")),
        ("running", JobState("FAILED", signal="SIGKILL"), ("failed", "killed by SIGKILL")),
        ("running", JobState("FAILED"), ("failed", "died without a word")),
        ("running", None, ("failed", "died without a word")),
        ("queued", JobState("CANCELLED"), ("cancelled", "")),
        ("finished", JobState("COMPLETED"), ("finished", "")),
        ("finished", JobState("COMPLETING"), ("finished", "")),
        ("interrupted", None, ("interrupted", "")),
    ],
)
def test_a_run_on_slurm(
    written: str, slurm: JobState | None, expected: tuple[str, str], make: Callable[..., RunFolder]
) -> None:
    run = make("a", jobs=("16", "17"), state=written)
    assert seen(run, {"16": JobState("COMPLETED"), **({"17": slurm} if slurm is not None else {})}) == expected


def test_a_failure_names_its_last_words_unless_slurm_knows_better(make: Callable[..., RunFolder]) -> None:
    run = make("a", jobs=("17",), state="failed", failed_rank=1, traceback="Traceback:\n  ...\nValueError: why\n")
    assert seen(run, {"17": JobState("FAILED", signal="SIGTERM")}) == ("failed", "ValueError: why")
    assert seen(run, {"17": JobState("OUT_OF_MEMORY")}) == ("failed", "OUT_OF_MEMORY")


def test_a_run_that_dies_while_it_draws_figures_is_finished(make: Callable[..., RunFolder]) -> None:
    """Slurm has ended the job with its script, for example, and nobody could write that down."""
    run = make("a", jobs=("17",), state="running", step=39_900)
    jobs = {"17": JobState("TIMEOUT")}
    assert seen(run, jobs) == ("failed", "TIMEOUT")
    (run.checkpoints / "step-00040000").mkdir(parents=True)
    finished = ("finished", "figures and final numbers are missing; the same command draws them")
    assert seen(run, jobs) == finished
    assert seen(run, {"17": JobState("RUNNING")}) == ("running", "silent for 60 min")
    _, config = run.read_experiment()
    run.write_experiment("mnist", replace(config, train=replace(config.train, steps=80_000)))
    assert seen(run, jobs) == ("failed", "TIMEOUT")  # it was to train on, and died before it did
    run.write_experiment("mnist", config)
    run.status.write_text(json.dumps({**run.read_status(), "state": "failed", "traceback": "loss is NaN"}))
    assert seen(run, jobs)[0] == "failed"


def test_without_an_answer_from_slurm_nobody_is_declared_dead(make: Callable[..., RunFolder]) -> None:
    run = make("a", jobs=("17",), state="running")
    found = states.summarize(run, None)
    assert (found.state, found.reason) == ("running", "Slurm does not answer")


def test_a_run_that_is_being_submitted_is_not_dead(make: Callable[..., RunFolder]) -> None:
    assert seen(make("a", age_s=1, state="queued")) == ("queued", "being submitted")
    assert seen(make("b", age_s=600, state="queued")) == ("failed", "died without a word")


def test_a_run_of_another_machine_lives_as_long_as_its_heart_beats(make: Callable[..., RunFolder]) -> None:
    for name, age_s, state in (("a", 5, "running"), ("b", 600, "failed")):
        run = make(name, age_s=age_s, state="running")
        run.update_launch(host="elsewhere")
        assert seen(run)[0] == state


def test_a_run_that_went_on_without_slurm_is_not_judged_by_the_job_that_it_had(make: Callable[..., RunFolder]) -> None:
    here = {"on_slurm": False, "host": os.uname().nodename}
    old = {"17": JobState("CANCELLED")}
    assert seen(make("a", jobs=("17",), state="running", **here), old) == ("failed", "died without a word")
    assert seen(make("b", jobs=("17",), state="queued", **here), old) == ("cancelled", "")  # it is back on Slurm
    there = {"on_slurm": False, "host": "elsewhere"}
    assert seen(make("c", age_s=5, jobs=("17",), state="running", **there), old) == ("running", "on elsewhere")


def test_a_damaged_status_file_spoils_one_line_and_not_the_table(make: Callable[..., RunFolder]) -> None:
    make("good", state="finished")
    bad = make("bad", state="running")
    bad.status.write_text('{"state": "runn')
    state, reason = seen(bad)
    assert state == "failed"
    assert "is not JSON" in reason


ODD = [
    {"step": "many"},
    {"updated": "2026-01-01T00:00:00"},  # of no time zone
    {"updated": "yesterday"},
    {"on_slurm": False, "state": None},
]


@pytest.mark.parametrize("damage", ODD)
def test_odd_values_spoil_one_line_and_not_the_table(damage: dict[str, Any], make: Callable[..., RunFolder]) -> None:
    good, odd = make("good", state="finished"), make("odd", state="running", on_slurm=True)
    odd.status.write_text(json.dumps({**json.loads(odd.status.read_text()), **damage}))
    table = listing.render([states.summarize(run, {}) for run in (good, odd)], 80)
    assert [line.split()[0] for line in table.splitlines()] == ["RUN", "mnist/good", "mnist/odd"]


def test_a_clock_that_was_set_back_declares_nobody_dead(make: Callable[..., RunFolder]) -> None:
    run = make("a", age_s=-600, state="running")
    with ownership.locked(run.path):
        assert seen(run) == ("running", "")


@pytest.mark.parametrize("cause", ["no locks", "cannot be opened"])
def test_a_lock_that_cannot_be_tried_spoils_one_line_at_most(
    cause: str, make: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    living, dead = make("a", age_s=5, state="running"), make("b", age_s=600, state="running")
    for run in (living, dead):
        if cause == "cannot be opened":
            (run.path / ".lock").symlink_to(".lock")
        else:
            (run.path / ".lock").touch()
            monkeypatch.setattr(fcntl, "flock", without_locks)
    assert seen(living) == ("running", f"on {os.uname().nodename}")
    assert seen(dead) == ("failed", "died without a word")


def without_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_run_is_not_made_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    run = RunFolder(tmp_path / "1d" / "a")
    with pytest.raises(UserError, match=r"cannot be locked: No locks available; what helps is another file system for"):
        run.create("1d", EXPERIMENTS["1d"].preset, {}, lambda code: code.mkdir())
    assert list(run.path.parent.iterdir()) == []


def test_a_damaged_launch_file_does_not_hide_the_newest_run(make: Callable[..., RunFolder]) -> None:
    runs = [make("a", age_s=5), make("b", age_s=600), make("c")]
    (runs[2].path / "launch.json").write_text('{"created"')
    assert find("mnist", runs[0].path.parent.parent).path == runs[0].path
    assert sweep.runs_of("mnist/x", runs[0].path.parent.parent) == []


def test_a_failure_is_recorded_where_files_cannot_be_linked(
    make: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    run = make("a", state="running")
    assert run.write_failure(1, "broken", state=State.FAILED)
    assert seen(run) == ("failed", "broken")
    assert run.read_failure()["failed_rank"] == 1


def test_a_failure_is_the_first_although_nfs_says_of_its_file_that_it_exists(
    make: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def answer_is_lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))  # so the question that is sent again is answered

    monkeypatch.setattr(os, "link", answer_is_lost)
    run = make("a", state="running")
    assert run.write_failure(1, "broken", state=State.FAILED)
    assert seen(run) == ("failed", "broken")
    monkeypatch.undo()
    assert not run.write_failure(0, "an echo", state=State.FAILED)
    assert seen(run) == ("failed", "broken")


def test_looking_leaves_no_trace_and_keeps_nobody_out(make: Callable[..., RunFolder]) -> None:
    run = make("a", state="running")
    before = sorted(path.name for path in run.path.iterdir())
    seen(run)
    assert sorted(path.name for path in run.path.iterdir()) == before
    with ownership.locked(run.path) as descriptor:
        assert descriptor is not None
        assert seen(run)[0] == "running"
    assert seen(run) == ("failed", "died without a word")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_the_newest_is_last(width: int, make: Callable[..., RunFolder]) -> None:
    long = make("a-name-of-a-run-that-somebody-thought-about-for-long", 10, jobs=("9",), state="running", loss=0.012345)
    full = {"rate_images_per_s": 12345.6, "eta_s": 123456, "restarts": 12, "step": 123_456, "total": 400_000}
    long.status.write_text(json.dumps({**long.read_status(), **full}))
    old = make("old", 1000, jobs=("8",), state="running")
    broken = make("broken", 20, state="failed", traceback="RuntimeError: " + "words " * 30)
    jobs = {"9": JobState("RUNNING", nodes="node[001-064,101-132]"), "8": JobState("OUT_OF_MEMORY")}
    found = listing.by_last_update(states.summarize(run, jobs) for run in (long, old, broken))
    lines = listing.render(found, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["RUN", "STATE", "STEP", "LOSS", "IMG/S", "LEFT", "RST", "NODES"]
    assert lines[1].startswith("mnist/old")
    assert lines[2].startswith("mnist/broken")
    for cell in ("running", "123456/400k", "0.0123", "12346", "34.3 h", "12"):
        assert cell in lines[3].split("  ") or cell in lines[3]
    if width == 120:
        assert "failed (OUT_OF_MEMORY)" in lines[1]


def test_a_local_run_from_its_start_to_its_sudden_death(tmp_path: Path) -> None:
    process = start(*ENDLESS, "--name", "a", cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until((run / ".lock").exists)
    wait_until(lambda: shown(tmp_path)["state"] == "running")
    wait_until(lambda: steps_logged(run) > 10)
    assert shown(tmp_path)["reason"] in ("", "starting")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert status(run)["state"] == "running"
    assert (shown(tmp_path)["state"], shown(tmp_path)["reason"]) == ("failed", "died without a word")


def test_the_parent_of_several_processes_dies_and_so_do_they(tmp_path: Path) -> None:
    process = start(*ENDLESS, "--name", "a", "--gpus", "2", cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    assert shown(tmp_path)["state"] == "running"
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    wait_until(lambda: status(run)["state"] != "running")
    assert shown(tmp_path)["state"] == "cancelled"


def shown(cwd: Path) -> dict[str, Any]:
    """The only run, as scripts see it."""
    (run,) = json.loads(done("status", "--json", cwd=cwd).out)
    return dict(run)


def test_one_run_in_detail(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "50", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    done("sample", "1d/a", "--num-samples", "100", "--steps", "5", "--name", "few", cwd=tmp_path, **NO_FIGURES)
    samples = tmp_path / "runs" / "1d" / "a" / "samples"
    shutil.copytree(samples / "few", samples / "many")  # of which the second shard is not there yet
    manifest = json.loads((samples / "many" / "manifest.json").read_text())
    more = {"num_samples": 70_000, "complete": False}
    (samples / "many" / "manifest.json").write_text(json.dumps({**manifest, **more}))
    text = done("status", "1d/a", cwd=tmp_path).out
    assert "runs/1d/a: finished" in text
    assert "step 50 of 50" in text
    assert "few: 100, complete" in text
    assert "many: 70,000, 1 of 2 shards" in text
    assert re.search(r"settings .*train.batch-size 64.*model.dim 16", text)
    said = json.loads(done("status", "1d", "--json", cwd=tmp_path).out)
    assert said["checkpoints"] == [50]
    assert said["samples"][1]["shards"] == 1


def test_only_a_run_that_has_not_finished_is_one_not_heard_of(make: Callable[..., RunFolder]) -> None:
    for name, words in (("finished", "ended 60 min ago"), ("interrupted", "last heard of 60 min ago")):
        assert words in detail.render(detail.describe(make(name, state=name), {}), 80)


def test_the_traceback_of_the_first_failure_is_shown(make: Callable[..., RunFolder], tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n  File x\nValueError: broken on purpose\n"
    run = make("a", state="failed", failed_rank=2, traceback=trace)
    text = done("status", run.path, cwd=tmp_path).out
    assert "process 2 failed first" in text
    assert text.count("broken on purpose") == 1
    assert "  File x" in text


def test_a_run_that_is_none(tmp_path: Path) -> None:
    assert done("status", cwd=tmp_path).out == "There are no runs in runs.\n"
    ended = launch("status", "1d/nothing", cwd=tmp_path)
    assert ended.code == 2
    assert "1d/nothing" in ended.err


def test_a_folder_around_a_run_or_inside_it_names_that_run(make: Callable[..., RunFolder]) -> None:
    run = make("a", 10)
    run.checkpoints.mkdir(exist_ok=True)
    for folder in (run.path.parent, run.checkpoints):
        with pytest.raises(UserError, match=f"{re.escape(str(folder))} does not; {re.escape(str(run.path))} does"):
            find(str(folder), run.path.parent)
