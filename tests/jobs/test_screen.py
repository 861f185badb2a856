"""`status --watch`: all runs on one screen, which goes on by itself and leaves the terminal as it was."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.experiments.experiment_json import write
from jobs.experiments.table import EXPERIMENTS
from jobs.storage.records import cut_after
from jobs.storage.run_folder import RunFolder
from jobs.watch import screen, states
from slurm.queue import JobState, Pace
from tests.launching import ROOT, done, launch, sentence


def make(runs_dir: Path, name: str, age_s: float = 1000, **status: Any) -> RunFolder:
    """Makes a run by hand."""
    run = RunFolder(runs_dir / "1d" / name)
    run.path.mkdir(parents=True)
    (run.path / "experiment.json").write_text(write("1d", EXPERIMENTS["1d"].preset))
    moment = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="milliseconds")
    (run.path / "launch.json").write_text(json.dumps({"created": moment, "job_ids": status.pop("jobs", [])}))
    run.status.write_text(json.dumps({"step": 30, "total": 40, "loss": 0.5, "updated": moment, **status}))
    return run


def log(run: RunFolder, *losses: float | None, first: int = 1) -> None:
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": first + i, "loss": loss}) + "\n" for i, loss in enumerate(losses))


def test_bars_and_curves_are_to_scale() -> None:
    assert screen.sparkline([2.0**-i for i in range(8)], 8) == "█▇▆▅▄▃▂▁"
    assert screen.sparkline([128, 128, 1, 1, 8, 8], 3) == "█▁▄"
    assert screen.sparkline([3.0, 3.0], 8) == "      ▁▁"
    assert screen.sparkline([], 8) == "        "
    assert [screen.progress_bar(share, 4) for share in (0, 0.5, 0.999, 1)] == ["░░░░", "██░░", "███░", "████"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_does_not_fit_is_counted_and_what_runs_is_shown(width: int, tmp_path: Path) -> None:
    runs = [make(tmp_path, f"old-{i:02}", age_s=i, state="finished") for i in range(28)]
    runs.append(make(tmp_path, "a-run-with-a-name-that-is-far-longer-than-others", 5000, state="running", jobs=["1"]))
    runs.append(make(tmp_path, "failed", 0, state="failed", traceback=f"ValueError: {'why' * 50}"))
    (runs[28].timing).write_text('{"time": "now", "event": "start", "processes": 4, "device": "cuda:0"}\n')
    found = screen.in_order([states.summarize(run, {"1": JobState("RUNNING", nodes="n1")}) for run in runs])
    records = {run.path: screen.Record(run) for run in runs}
    for record in records.values():
        record.read()
    lines = screen.render(found, records, width, 10, is_silent=True)
    assert len(lines) == 10
    assert max(map(len, lines)) <= width
    assert lines[0].endswith("1 running, 1 failed, 28 finished; 4 GPUs busy; Slurm does not answer"[: width - 10])
    assert re.match(r"1d/.* running .* 75%", lines[3])
    assert lines[4].startswith("  silent for 83 min")
    assert " failed " in lines[5] and lines[6].startswith("  ValueError: whywhy") and lines[6].endswith(" ..")
    assert [line.split()[0][-2:] for line in lines[7:9]] == ["00", "01"]
    assert lines[9] == "and 26 more: 26 finished"
    assert len(screen.render(found, records, width, None, is_silent=False)) == 3 + 32


def test_a_curve_follows_a_run_that_begins_again_at_its_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path, "a", state="running")
    record = screen.Record(run)
    record.read()
    assert record.losses == []
    log(run, 5.0, None, 4.0, 3.0)
    record.read()
    cut_after(run.metrics, 3)
    log(run, 2.0, 1.0, first=4)
    record.read()
    assert record.losses == [5.0, 4.0, 2.0, 1.0]


def test_slurm_is_asked_at_its_pace_and_not_with_each_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, "a", age_s=0, state="running", jobs=["7"])
    clock, pictures, asked = iter(range(10_000)), iter(range(30)), []
    monkeypatch.setattr(screen, "_pause", lambda seconds, size: None)

    def find() -> list[RunFolder]:
        if next(pictures, None) is None:
            run.status.write_text(json.dumps({**run.read_status(), "state": "finished"}))
        return [run]

    def ask(job_ids: list[str]) -> dict[str, JobState]:
        asked.append(job_ids)
        return {"7": JobState("RUNNING", nodes="n1")}

    screen.watch(find, ask, Pace(60, lambda: next(clock)).is_due)
    assert asked == [["7"]]  # its heart beats: nothing more to ask
    out = capsys.readouterr().out
    assert out.count("1 running") == 30 and out.count("1 finished") == 1


def test_a_file_gets_plain_blocks_until_no_run_lives(tmp_path: Path) -> None:
    run = make(tmp_path / "runs", "a", state="finished")
    log(run, 4.0, 2.0, 1.0)
    shown = done("status", "--watch", cwd=tmp_path, plain=True, PYTHONIOENCODING="ascii").out
    assert "\033" not in shown
    assert re.search(r"1d/a +finished .*###### *\S* +75% .*#=_ 0\.5", shown)
    ended = launch("status", "1d/none", "--watch", cwd=tmp_path)
    assert ended.code == 2 and "there is no run" in sentence(ended.err)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path, columns: int, lines: int) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        command = [sys.executable, str(ROOT / "launch.py"), *arguments]
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**env, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs, process_group=0
        )
        os.close(theirs)
        self.said, self._decoder = "", codecs.getincrementaldecoder("utf-8")()  # a read may end within a letter

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read_until(self, pattern: str, timeout_s: float = 60) -> str:
        """Reads until the pattern is there; returns what it has read since the last time."""
        deadline, begin = time.monotonic() + timeout_s, len(self.said)
        while not re.search(pattern, self.said[begin:], re.DOTALL):
            assert time.monotonic() < deadline, self.said[begin:]
            if select.select([self._ours], [], [], 0.1)[0]:
                self.said += self._decoder.decode(os.read(self._ours, 65536))
        return self.said[begin:]


@pytest.mark.processes
def test_a_terminal_shows_what_changes_and_is_left_as_it_was(tmp_path: Path) -> None:
    run = make(tmp_path / "runs", "a", state="finished")
    log(run, 4.0, 2.0, 1.0)
    terminal = Terminal("status", "--watch", cwd=tmp_path, columns=80, lines=24)
    shown = terminal.read_until(r"1d/a .*finished.*\033\[J")
    assert shown.startswith("\033[?1049h\033[?25l")
    assert "█▅▁ 0.5" in shown and "██████░░  75%" in shown
    terminal.resize(120, 24)
    terminal.read_until(r"████████████░░░░  75%.*\033\[J")  # bars grow with the terminal
    run.status.write_text(json.dumps({**run.read_status(), "step": 40}))
    terminal.read_until(r"████████████████ 100%.*\033\[J")
    terminal.process.send_signal(signal.SIGINT)
    left = terminal.read_until(r"\033\[\?1049l.*1d/a")
    assert "\033[?25h" in left and "Traceback" not in left
    assert terminal.process.wait(60) == 130
