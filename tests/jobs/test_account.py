"""How the time of a run was spent: the parts are the whole, and redone steps are those that were lost."""

import json
import os
import signal
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.storage.account import PARTS, Account, account
from jobs.storage.records import read_jsonl
from tests.launching import NO_FIGURES, TINY, done, finish, interrupt, start, status, steps_logged, wait_until

CREATED = datetime(2025, 3, 1, 12, tzinfo=UTC)


def at(second: float) -> str:
    return (CREATED + timedelta(seconds=second)).isoformat(timespec="milliseconds")


def line(second: float, event: str, **values: Any) -> dict[str, Any]:
    return {"time": at(second), "event": event, **values}


def begun(second: float, step: int, **values: Any) -> list[dict[str, Any]]:
    """A job whose process begins two seconds before it says so, and that needs three more until its first step."""
    first = {"restarts": 1, "began": at(second - 2), **values}
    return [line(second, "start", step=step, **first), line(second + 3, "begin", step=step, compile_s=2.0)]


PREEMPTED_AND_KILLED = [
    line(1, "queued"),
    *begun(13, 0, restarts=0, reached=0, on_slurm=True),
    line(26, "progress", step=100, checkpoint_s=0.01),
    line(37, "requeued", step=200, checkpoint_wait_s=2.0),
    *begun(49, 200, on_slurm=True, reached=200, heard=at(37)),
    line(62, "progress", step=300, checkpoint_s=0.0),
    # Killed 5 s later at step 350, with a checkpoint of step 260.
    *begun(73, 260, on_slurm=True, reached=350, heard=at(67)),
    line(85, "progress", step=350, checkpoint_s=0.0),
    line(95, "progress", step=400, checkpoint_s=0.02),
    line(106, "hung", seconds=10),
    # The watchdog has ended the job, and somebody continues it by hand.
    line(120, "queued", heard=at(107)),
    *begun(125, 360, on_slurm=True, reached=420, heard=at(120)),
    line(140, "progress", step=480, checkpoint_s=0.0),
    line(142, "figures", step=500, checkpoint_wait_s=1.0),
    line(146, "finished", step=500, checkpoint_wait_s=1.0),
]


def test_a_history_with_everything() -> None:
    found = account(PREEMPTED_AND_KILLED, created=at(0), heard=at(146), reached=500, now=None, waits=False)
    # From 128 s on, the last job redoes 60 of its first 120 steps in half of 12 s.
    expected = {
        "queued": (1, 11, 37, 47, 67, 71, 120, 123),
        "starting": (0, 1, 11, 14, 47, 50, 71, 74, 123, 126),
        "compiling": (14, 16, 50, 52, 74, 76, 126, 128),
        "useful": (16, 36, 52, 67, 85, 94, 95, 96, 106, 107, 134, 140, 140, 141),
        "redone": (76, 85, 128, 134),
        "saving": (35, 37, 94, 95, 141, 142),
        "figures": (142, 146),
        "hung": (96, 106),
        "stopped": (107, 120),
    }
    sums = {part: sum(b - a for a, b in zip(edges[::2], edges[1::2], strict=True)) for part, edges in expected.items()}
    sums["useful"] -= 1  # of the second in which the first checkpoint was waited for
    assert found.seconds == pytest.approx(sums)
    assert found.whole_s == pytest.approx(146)
    assert (found.useful_steps, found.redone_steps) == (500, 90 + 60)


@pytest.mark.parametrize(
    ("now", "waits", "expected"),
    [
        (None, False, {"useful": 30, "starting": 3, "queued": 2}),  # it is dead: up to its last sign of life
        (at(60), False, {"useful": 55, "starting": 3, "queued": 2}),
        (at(60), True, {"useful": 30, "starting": 3, "queued": 27}),  # Slurm has taken the node for dead
    ],
)
def test_the_last_part_ends_now_or_with_the_last_sign_of_life(
    now: str | None, waits: bool, expected: Mapping[str, float]
) -> None:
    lines = [
        line(4, "start", step=0, restarts=0, began=at(2), on_slurm=True, reached=0),
        line(5, "begin", step=0, compile_s=0.0),
    ]
    found = account(lines, created=at(0), heard=at(35), reached=30, now=now, waits=waits)
    assert {part: seconds for part, seconds in found.seconds.items() if seconds} == pytest.approx(expected)
    assert (found.useful_steps, found.redone_steps) == (30, 0)


def test_times_of_an_earlier_version() -> None:
    """It did not mark when a process or the steps began, nor when a killed job was last heard of."""
    lines = [
        line(5, "start", step=0, restarts=0),
        line(15, "progress", step=50, checkpoint_s=0.0),
        line(30, "start", step=40, restarts=1),
        line(45, "progress", step=60, checkpoint_s=0.0),
        line(50, "finished", step=60, checkpoint_wait_s=0.0),
    ]
    found = account(lines, created=at(0), heard=at(50), reached=60, now=None, waits=False)
    assert found.seconds == pytest.approx(
        dict.fromkeys(PARTS, 0.0) | {"starting": 5, "useful": 10 + 7.5 + 5, "redone": 7.5, "stopped": 15}
    )
    assert (found.useful_steps, found.redone_steps) == (60, 10)


def test_a_run_without_a_line_has_spent_nothing() -> None:
    assert account([], created=None, heard=None, reached=0, now=None, waits=False) == Account()


def begun(run: Path) -> int:
    """How often the steps of the run have begun."""
    return sum(line["event"] == "begin" for line in read_jsonl(run / "timing.jsonl"))


def test_the_time_of_a_killed_and_continued_run(tmp_path: Path) -> None:
    command = ("train", "1d", *TINY, "--train.steps", "1000000", "--train.checkpoint-every", "100", "--name", "a")
    run = tmp_path / "runs" / "1d" / "a"
    redone = 0
    for life, killed_at in ((1, 120), (2, 320)):
        process = start(*command, cwd=tmp_path, **NO_FIGURES)
        # Before its steps begin, the lines that it makes again are still there.
        wait_until(lambda n=life: begun(run) == n)  # type: ignore[misc]
        wait_until(lambda lines=killed_at: steps_logged(run) >= lines)  # type: ignore[misc]
        wait_until(lambda: any((run / "checkpoints").glob("step-*")))  # a slow disk may still be at the first one
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
        saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
        redone += steps_logged(run) - saved
    reached = steps_logged(run)
    process = start(*command, cwd=tmp_path, **NO_FIGURES)
    wait_until(lambda: steps_logged(run) > reached)
    assert interrupt(process, signal.SIGINT).code == 130
    time = json.loads(done("status", "1d/a", "--json", cwd=tmp_path).out)["time"]
    created = datetime.fromisoformat(json.loads((run / "launch.json").read_text())["created"])
    whole_s = (datetime.fromisoformat(status(run)["updated"]) - created).total_seconds()
    assert sum(time["seconds"].values()) == pytest.approx(whole_s, rel=0.01, abs=0.5)
    assert time["redone_steps"] == redone > 0
    assert time["useful_steps"] == steps_logged(run) > reached
    assert min(time["seconds"][part] for part in ("useful", "redone", "starting", "stopped", "saving")) > 0
    assert f"{redone:,} steps redone" in done("status", "1d/a", cwd=tmp_path).out
