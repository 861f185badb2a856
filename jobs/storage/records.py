"""What a training leaves beside its checkpoints: metrics.jsonl, timing.jsonl and the heartbeat status.json."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jobs.files import named, write_atomically, write_json
from jobs.storage.ownership import Ownership
from jobs.storage.run_folder import RunFolder, State

HEARTBEAT_S = 2.0
SHAPES: dict[str, tuple[dict[str, Any], ...]] = {
    "metrics.jsonl": ({"step": int},),
    "quality.jsonl": ({"step": int, "metrics": dict},),
    "timing.jsonl": ({"time": str, "event": str},),
    "checkpoints.jsonl": ({"step": int, "sha256": dict}, {"continued": int}),
    "faults.jsonl": ({"time": str, "cause": str, "node": str | None, "again": bool}, {"continued": str}),
    "jobs.jsonl": ({"job_id": str},),
}
"""What the lines of each file hold at least, in one of these forms; a line of another form is skipped."""


def now(ago_s: float = 0.0) -> str:
    """Returns the time in UTC, or that of so many seconds ago, as ISO 8601 writes it."""
    # Always with milliseconds, also if they are 0: times are compared as text.
    return (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat(timespec="milliseconds")


class Metrics:
    """Writes metrics.jsonl: one object for each logged step, with nothing but values that the settings determine.

    Lines are kept until they are on the disk, so one that cannot take them for a while ends no training.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Continues after `step`: later lines are cut, because training will make them again."""
        cut_after(path, step)
        path.touch()
        self._path, self._file = path, path.open("r+b", buffering=0)
        self._synced = os.fstat(self._file.fileno()).st_size
        self._lines = bytearray()
        """All since the last `sync`; so many bytes of them are in the file behind those that are synced."""
        self._written = 0
        self._pause_until = 0.0

    def add(self, values: dict[str, Any]) -> None:
        """Remembers a line."""
        self._lines += json.dumps(values).encode() + b"\n"

    def is_due(self) -> bool:
        """Whether to try `write`: at each line, but after a failure only every `HEARTBEAT_S`."""
        return time.monotonic() >= self._pause_until

    def write(self) -> None:
        """Puts all lines into the file, which others read while it grows; raises OSError where that cannot be."""
        self._pause_until = time.monotonic() + HEARTBEAT_S
        # If it fails, the disk may have lost any of them: NFS says of one write that an earlier one was lost.
        written, self._written = self._written, 0
        with named(self._path):
            # Each byte at its own place: a torn line is completed, a lost one comes back, and the file never shrinks.
            self._file.seek(self._synced + written)
            while written < len(self._lines):
                written += self._file.write(self._lines[written:])
        self._written, self._pause_until = written, 0.0

    def sync(self) -> None:
        """Puts the lines on the disk; only after that a checkpoint that covers them may be written."""
        self.write()
        self._written = 0  # the same here
        with named(self._path):
            os.fsync(self._file.fileno())
        self._synced += len(self._lines)
        self._lines.clear()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a file of lines, [] if it is not there.

    Skips lines that a kill or a full disk has cut, or that somebody has edited into another form.
    """
    return _objects(path.read_text(errors="replace"), path) if path.exists() else []


def skipped(folder: Path) -> dict[str, int]:
    """How many lines of each file in the folder are skipped, where there are any."""
    found = {}
    for path in filter(Path.exists, map(folder.joinpath, SHAPES)):
        lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
        if number := len(lines) - len(read_jsonl(path)):
            found[path.name] = number
    return found


def append(path: Path, values: dict[str, Any]) -> None:
    """Appends a line to a file of lines. Where the last one was cut, it stays alone."""
    with named(path), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        end = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(end + json.dumps(values).encode() + b"\n")


def last_step(metrics: Path) -> int:
    """Returns the step of the last line of metrics.jsonl, 0 if there is none."""
    lines = read_jsonl(metrics)
    return int(lines[-1]["step"]) if lines else 0


def held_out_losses(metrics: Path) -> dict[int, float]:
    """Returns the held-out losses in metrics.jsonl by step, without those that were not finite."""
    if not metrics.exists():
        return {}
    with metrics.open(errors="replace") as file:  # only few of its lines have one, and are parsed
        lines = _objects("".join(line for line in file if '"held_out_loss"' in line), metrics)
    return {line["step"]: line["held_out_loss"] for line in lines if isinstance(line.get("held_out_loss"), float | int)}


def starts(timing: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the starts among the lines of timing.jsonl, in order, each with its step and the facts of its machine.

    `came_to` is how far one came: to steps, or to the end of its job without any. Who came to neither has none.
    """
    found: list[dict[str, Any]] = []
    for line in timing:
        event = line.get("event")
        if event == "start":
            found.append(line)
        elif event == "begin" and found:
            # Whether it was compiled in the end; older versions wrote how long that took, and never went on without.
            compiled = line.get("compile", "always" if line.get("compile_s") else "never")
            found[-1] = {**found[-1], "compile": compiled, "came_to": "steps"}
        elif event in list(State) and found:
            found[-1] = {"came_to": "the end", **found[-1]}
    return found


def last_start(run: RunFolder) -> dict[str, Any]:
    """Returns the last start; {} before the first."""
    return (starts(read_jsonl(run.timing)) or [{}])[-1]


def precision_of(run: RunFolder, asked: str, otherwise: str) -> Any:
    """Returns a run's precision: `asked`, or for auto what its first start has chosen; before that, `otherwise`."""
    # The last start has the precision of the first, because each start takes it over from the one before.
    return asked if asked != "auto" else last_start(run).get("precision", otherwise)


class Tail:
    """Reads a file of lines that grows; it is open only while it is read, because there may be thousands of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id = self._position = 0
        self.is_new = False
        """Whether the file is another one than before, and was read from its beginning."""

    def read(self) -> list[dict[str, Any]]:
        """The objects of all lines that have been completed since the last time."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                # `cut_after` renames a new file over the old one, so the inode tells.
                self.is_new = facts.st_ino != self._file_id or facts.st_size < self._position
                self._file_id, self._position = facts.st_ino, 0 if self.is_new else self._position
                file.seek(self._position)
                text = file.read()
        except OSError:  # there is none yet
            self.is_new = False
            return []
        self._position += text.rfind(b"\n") + 1
        return _objects(text.decode(errors="replace"), self._path)


def _objects(text: str, path: Path) -> list[dict[str, Any]]:
    """Returns the objects of all whole lines."""
    *lines, _ = text.split("\n")
    forms = SHAPES.get(path.name, ({},))
    objects = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and any(_has(value, form) for form in forms):
                objects.append(value)
    return objects


def _has(line: dict[str, Any], form: dict[str, Any]) -> bool:
    return all(name in line and isinstance(line[name], kind) for name, kind in form.items())


def cut_after(path: Path, step: int) -> None:
    """Removes the lines of metrics.jsonl that belong to later steps."""
    if path.exists():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        # The lines keep their bytes, as the promise of equal runs needs: Python keeps the order of names, and writes a
        # float as the shortest text that reads back as this very float.
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_timing(run: RunFolder, values: dict[str, Any]) -> None:
    """Appends one line to timing.jsonl."""
    # Opened for each line, because launchers and those who judge a hang append to it as well.
    append(run.timing, {"time": now(), **values})


class Status:
    """Writes status.json, the heartbeat of a run."""

    def __init__(self, run: RunFolder, owner: Ownership, total: int, on_slurm: bool) -> None:
        self._run, self._owner = run, owner
        self._beat = -HEARTBEAT_S
        self.previous = previous = run.read_status()
        self.values: dict[str, Any] = {
            "state": State.RUNNING,
            "step": 0,
            "total": total,
            "loss": previous.get("loss"),
            "held_out_loss": previous.get("held_out_loss"),
            "rate_images_per_s": None,
            "eta_s": None,
            "updated": None,
            # The first start is no restart.
            "restarts": previous.get("restarts", -1) + 1,
            "out_of_time_at": previous.get("out_of_time_at"),
            "host": platform.node(),
            "pid": os.getpid(),
            "on_slurm": on_slurm,
        }

    def is_due(self) -> bool:
        """Whether the last time that status.json was to be written is `HEARTBEAT_S` ago."""
        return time.monotonic() - self._beat >= HEARTBEAT_S

    def write(self, **values: Any) -> None:
        """Writes at once."""
        self._beat = time.monotonic()
        self._owner.check()
        self.values.update(values, updated=now())
        # A process that has failed for good has the last word, also where a heartbeat comes after it.
        write_json(self._run.status, {**self.values, **self._run.final_failure()})
