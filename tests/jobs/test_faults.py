"""Training against a full disk, damaged checkpoints, NaN, and other jobs that take a run over."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.storage import checkpoints, faults
from jobs.storage.ownership import Ownership
from jobs.storage.records import last_start, read_jsonl
from jobs.storage.run_folder import RunFolder
from tests.disturbances import small_disk
from tests.launching import (
    NO_FIGURES,
    TINY,
    done,
    finish,
    interrupt,
    launch,
    slowed,
    start,
    status,
    steps_logged,
    wait_until,
)

COMMAND = ("train", "1d", *TINY, "--name", "a")


def all_finite(run: Path) -> bool:
    files = [path for pattern in ("model", "ema") for path in run.glob(f"checkpoints/step-*/{pattern}.safetensors")]
    return all(bool(torch.isfinite(value).all()) for path in files for value in load_file(path).values())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_diverging_run_stops_and_names_the_step_and_the_last_good_checkpoint(processes: int, tmp_path: Path) -> None:
    where = ("--device", "cpu", "--gpus", processes)
    explode = (
        "--train.lr",
        "1e30",
        "--train.checkpoint-every",
        "1",
        "--train.steps",
        "200",
        "--train.warmup-steps",
        "0",
    )
    ended = launch(*COMMAND, *explode, *where, cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    assert ended.code == 1
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-5:]
    assert [line["skipped"] for line in last] == [1] * 5
    assert f"steps up to {last[-1]['step']}" in ended.err
    assert "last good checkpoint is of step" in ended.err
    assert "Traceback" not in ended.err
    assert status(run)["state"] == "failed"
    assert all_finite(run)


def test_damage_to_the_newest_checkpoint_costs_steps_and_nothing_else(tmp_path: Path) -> None:
    long = ("--train.steps", "300", "--train.checkpoint-every", "100", "--train.keep-checkpoints", "5")
    run = tmp_path / "runs" / "1d" / "a"
    done(*COMMAND, *long, cwd=tmp_path, **NO_FIGURES)
    reference = tmp_path / "reference"
    shutil.copytree(run, reference)
    # At step 200, or a little later if the disk was still busy with the one of step 100.
    one_before = checkpoints.steps(run / "checkpoints")[1]
    os.truncate(run / "checkpoints" / "step-00000300" / "model.safetensors", 100)
    (run / "status.json").unlink()
    again = done(*COMMAND, *long, cwd=tmp_path, **NO_FIGURES)
    assert "step-00000300" in again.out
    assert f"after step {one_before} of 300" in again.out
    for name in (
        "metrics.jsonl",
        *(f"checkpoints/step-00000300/{file}" for file in (*checkpoints.FILES, "manifest.json")),
    ):
        assert (run / name).read_bytes() == (reference / name).read_bytes()


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    done(*COMMAND, "--train.steps", "40", "--train.checkpoint-every", "20", cwd=tmp_path, **NO_FIGURES)
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / "model.safetensors", 100)
    logged, held = (run / "metrics.jsonl").read_bytes(), sorted((run / "checkpoints").iterdir())
    ended = launch("resume", run, "--train.steps", "60", cwd=tmp_path)
    assert ended.code == 1
    assert "to begin anew, move them away" in ended.err
    assert "Traceback" not in ended.err
    assert (run / "metrics.jsonl").read_bytes() == logged
    assert sorted((run / "checkpoints").iterdir()) == held
    refused = launch("sample", run, cwd=tmp_path)
    assert refused.code == 2
    assert "to begin anew, move them away" in refused.err


SPOILT = {
    "metrics.jsonl": ['{"loss": 1}', '{"step": "7", "held_out_loss": "low"}', "[1]"],
    "quality.jsonl": ['{"step": 7, "metrics": null}', "7"],
    "timing.jsonl": ["null", '{"event": 3}', '{"time": "noon", "event": "progress"}'],
    "checkpoints.jsonl": ['{"step": "7", "sha256": {}}', '{"continued": "7"}'],
    "faults.jsonl": ['{"time": 7, "cause": "why"}', '{"continued": 7}'],
}


def test_lines_that_somebody_has_edited_or_a_disk_has_cut_are_skipped_with_a_sentence(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    done(*COMMAND, "--train.steps", "10", cwd=tmp_path, **NO_FIGURES)
    for name, lines in SPOILT.items():
        with (run / name).open("a") as file:
            file.write("\n".join([*lines, '{"step": 9, "tim']))
    again = done("resume", run, "--train.steps", "20", cwd=tmp_path, **NO_FIGURES)
    assert "WARNING: 4 lines of metrics.jsonl cannot be read and count for nothing" in again.out
    assert [name for name in SPOILT if f"lines of {name} cannot be read" not in again.out] == []
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 21))
    assert last_start(RunFolder(run))["step"] == 10  # although the line before was cut
    assert "finished" in done("status", run, cwd=tmp_path).out


def cpu_s(pid: int) -> float:
    """The seconds for which a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_full_disk_ends_no_training_and_loses_neither_checkpoint_nor_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=16) as disk:
        settings = ("--train.steps", "1000000", "--train.checkpoint-every", "50", "--runs-dir", disk)
        run = disk / "1d" / "a"
        process = start(*COMMAND, *settings, cwd=tmp_path)
        wait_until(lambda: len(checkpoints.steps(run / "checkpoints")) >= 2)
        filler = disk / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], stderr=subprocess.DEVNULL, check=False)
        full = cpu_s(process.pid)
        wait_until(lambda: cpu_s(process.pid) > full + 1)  # a checkpoint was on its way
        kept, spent = checkpoints.newest(run / "checkpoints", pytest.fail), cpu_s(process.pid)
        assert kept
        wait_until(lambda: cpu_s(process.pid) > spent + 1)
        assert checkpoints.newest(run / "checkpoints", pytest.fail) == kept
        filler.unlink()
        wait_until(lambda: checkpoints.steps(run / "checkpoints")[0] > kept)
        ended = interrupt(process, signal.SIGINT)
        assert ended.code == 130 and "metrics.jsonl: No space left on device" in ended.out, ended
        step = checkpoints.newest(run / "checkpoints", pytest.fail)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
        assert status(run)["step"] == step


def test_what_follows_a_fault_is_decided_again_when_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        filler = disk / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], stderr=subprocess.DEVNULL, check=False)
        monkeypatch.setattr("time.sleep", lambda seconds: filler.unlink())
        decided = faults.patiently(
            lambda: faults.judge_share(disk / ".failure-0.json", "3 shards", 2, "was killed", "n1", None)
        )
        assert decided.again
        assert [line["cause"] for line in read_jsonl(disk / faults.FILE)] == ["was killed"]
        assert not filler.exists()


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", disk], check=True)
    try:
        done(*COMMAND, "--train.steps", "20", "--runs-dir", disk, cwd=tmp_path, **NO_FIGURES)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        run = disk / "1d" / "a"
        commands = [("resume", run, "--train.steps", "40"), ("sample", run), ("train", "1d"), ("drill",)]
        for command in commands:
            ended = launch(*command, "--runs-dir", disk, "--cluster", "local", cwd=tmp_path)
            assert ended.code == 2, ended
            assert "Read-only file system" in ended.err
            assert "Traceback" not in ended.err
        assert checkpoints.newest(run / "checkpoints", pytest.fail) == 20
        assert "finished" in done("status", "--runs-dir", disk, cwd=tmp_path).out
    finally:
        subprocess.run(["umount", disk], check=True)


def visible(run: Path) -> dict[Path, int]:
    """The files that a run has to show, with the time of their last change.

    One that was being written aside, under a name with a dot, when its process was stopped may still grow or go.
    """
    files = (path for path in run.rglob("*") if not any(part.startswith(".") for part in path.relative_to(run).parts))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def test_a_superseded_run_stops_without_writing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    process = start(*COMMAND, "--train.steps", "1000000", "--train.checkpoint-every", "100", cwd=tmp_path)
    wait_until(lambda: len(checkpoints.steps(run / "checkpoints")) >= 1)
    os.kill(process.pid, signal.SIGSTOP)  # so that nothing is written between taking over and looking
    Ownership.take(run)
    before, lines = visible(run), steps_logged(run)
    os.kill(process.pid, signal.SIGCONT)
    ended = finish(process)
    assert ended.code == 1
    assert "taken over" in ended.err
    assert steps_logged(run) - lines <= 1  # a line that was on its way
    after = visible(run)
    changed = {path.name for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    assert changed <= {"metrics.jsonl", "timing.jsonl"}


def test_time_alone_makes_checkpoints_too(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    process = start(
        *COMMAND,
        "--train.steps",
        "1000000",
        "--train.checkpoint-every",
        "1000000",
        "--train.checkpoint-minutes",
        "0.01",
        cwd=tmp_path,
        **NO_FIGURES,
        **slowed("jobs.train.loop", "logged", 0.01),
    )
    wait_until(lambda: len(checkpoints.steps(run / "checkpoints")) >= 2)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 130
    assert status(run)["state"] == "cancelled"
