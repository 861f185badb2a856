"""All runs on one screen that is drawn again and again, for `status --watch`."""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import FrameType

from jobs.storage.records import HEARTBEAT_S, Tail
from jobs.storage.run_folder import RunFolder, State
from jobs.terminal import tables
from jobs.watch import states
from jobs.watch.states import Jobs, Overview

PLAIN_S = 30.0
"""Seconds between two blocks where the output is no terminal."""
SHARE = 0.1
"""At most this share of the time goes into looking at the files of thousands of runs."""
ORDER = (State.RUNNING, State.REQUEUED, State.QUEUED)
"""Runs in these states come first, in this order; then the others."""
COLORS: dict[str, int] = {State.FAILED: 31, State.QUEUED: 33, State.REQUEUED: 33, State.FINISHED: 32, State.RUNNING: 1}
"""Codes of terminals: red, yellow, green, bold."""
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█░", "_.-~=+*#."
"""Eight heights of a curve, the last one also for what is done, and what is still to do."""

Ask = Callable[[list[str]], Jobs | None]


class Record:
    """What the files of a run say of its losses and its GPUs, read as they grow."""

    def __init__(self, run: RunFolder) -> None:
        self._metrics, self._timing = Tail(run.metrics), Tail(run.timing)
        self.losses: list[float] = []
        self.gpus = 0

    def read(self) -> None:
        lines = self._metrics.read()
        before = [] if self._metrics.is_new else self.losses  # a new start writes the lines up to its checkpoint anew
        self.losses = before + [line["loss"] for line in lines if line.get("loss") is not None]
        for line in self._timing.read():
            if line.get("event") == "start":
                self.gpus = line.get("processes", 1) if str(line.get("device")).startswith("cuda") else 0


def watch(find: Callable[[], list[RunFolder]], ask: Ask, is_due: Callable[[bool | None, object], bool]) -> None:
    """Shows runs until Ctrl-C; where the output is no terminal, block after block until none of them lives.

    `find` finds the runs, `ask` asks Slurm about jobs, `is_due` is that of its pace.
    """
    records: dict[Path, Record] = {}
    jobs: Jobs | None = {}
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with _whole_screen() if on_terminal else _no_screen() as show:
        while True:
            began = time.monotonic()
            runs = find()
            if job_ids := states.newest_jobs(runs):
                living = [run for run in runs if states.read_status(run).get("state") in states.UNSETTLED]
                # None and not False: that would mean that a run has ended, and Slurm would be asked at once.
                if is_due(all(states.lives(run) for run in living) or None, tuple(job_ids)):
                    jobs = ask(job_ids)
            else:
                jobs = {}
            found = in_order([states.summarize(run, jobs) for run in runs])
            size = shutil.get_terminal_size()
            height = size.lines if on_terminal else None
            # Files are read of runs that fit on the screen, and of all that run, whose GPUs are counted above them.
            shown = (
                found if height is None else [o for i, o in enumerate(found) if i < height or o.state == State.RUNNING]
            )
            for overview in shown:
                path = Path(overview.path)
                records.setdefault(path, Record(RunFolder(path))).read()
            show(render(found, records, size.columns, height, jobs is None))
            if not on_terminal and not any(overview.state in states.UNSETTLED for overview in found):
                return
            pause_s = HEARTBEAT_S if on_terminal else PLAIN_S
            _pause(max(pause_s, (time.monotonic() - began) / SHARE), size if on_terminal else None)


def in_order(overviews: Sequence[Overview]) -> list[Overview]:
    """Sorts runs: those that run, those that wait, the others; of each the newest first."""
    newest = sorted(overviews, key=lambda overview: overview.updated, reverse=True)
    # Python sorts stably: runs of one rank stay in the order of their last updates.
    rank: dict[str, int] = {state: i for i, state in enumerate(ORDER)}
    return sorted(newest, key=lambda overview: rank.get(overview.state, len(rank)))


def render(
    overviews: Sequence[Overview], records: Mapping[Path, Record], width: int, height: int | None, is_silent: bool
) -> list[str]:
    """Returns lines of at most `width` characters, at most `height` of them; `is_silent` if Slurm does not answer."""
    lines = [_headline(overviews, records, is_silent)[:width]]
    if overviews:
        fitting = overviews[:height]
        table = _table(fitting, records, width)
        lines += ["", table[0]]
        for i, (overview, row) in enumerate(zip(fitting, table[1:], strict=True)):
            block = [_colored(row, overview.state)]
            if overview.reason:
                reason = " ".join(overview.reason.split())
                cut = reason if len(reason) <= width - 2 else f"{reason[: width - 5]} .."
                block.append(_colored(f"  {cut}", overview.state))
            left = len(overviews) - i
            # If others follow, a line must stay free for the sentence that counts them.
            if height is not None and len(lines) + len(block) + (left > 1) > height:
                hidden = [o.state for o in overviews[i:]]
                counts = ", ".join(f"{hidden.count(state)} {state}" for state in dict.fromkeys(hidden))
                lines.append(f"and {left} more: {counts}"[:width])
                break
            lines += block
    return lines


def _headline(overviews: Sequence[Overview], records: Mapping[Path, Record], is_silent: bool) -> str:
    """Counts runs by their state, and the GPUs that they keep busy."""
    found = [overview.state for overview in overviews]
    counts = ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found)) or "no runs yet"
    running = [Path(overview.path) for overview in overviews if overview.state == State.RUNNING]
    gpus = sum(records[path].gpus for path in running if path in records)
    parts = [f"{datetime.now():%H:%M:%S}  {counts}", f"{gpus} GPU{'s' if gpus > 1 else ''} busy" if gpus else ""]
    return "; ".join(filter(None, [*parts, "Slurm does not answer" if is_silent else ""]))


def _table(overviews: Sequence[Overview], records: Mapping[Path, Record], width: int) -> list[str]:
    """Returns a header and a line for each run; bars and curves take what room there is."""
    bar, curve = (8, 8) if width < 100 else (16, 24)
    rows = []
    for o in overviews:
        losses = records[Path(o.path)].losses if Path(o.path) in records else []
        rows.append(
            (
                o.run,
                o.state,
                f"{progress_bar(o.step / o.total, bar)} {o.step / o.total:4.0%}" if o.total else "",
                f"{sparkline(losses, curve)} {o.loss:.4f}" if o.loss is not None else "",
                f"{o.rate_images_per_s:.0f}" if o.rate_images_per_s is not None else "",
                tables.duration(o.eta_s),
                str(o.restarts),
            )
        )
    headers = ("RUN", "STATE", "PROGRESS", "LOSS", "IMG/S", "LEFT", "RST")
    return [
        line[:width] for line in tables.render(headers, rows, width=width, names={"RUN"}, texts={"STATE"}).split("\n")
    ]


def progress_bar(share: float, width: int) -> str:
    """Draws how much is done; the end is drawn only when it is reached."""
    done = min(width, math.floor(share * width))
    return _blocks()[7] * done + _blocks()[8] * (width - done)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws a curve of `width` characters on a logarithmic scale, from the means of as many stretches."""
    width_of_values = min(width, len(values))
    edges = [round(i * len(values) / width_of_values) for i in range(width_of_values + 1)] if values else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    # A loss may be 0, whose logarithm is minus infinity.
    heights = [math.log(max(mean, 1e-12)) for mean in means]
    low, high = min(heights, default=0.0), max(heights, default=0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(_blocks()[round((height - low) * scale)] for height in heights).rjust(width)


def _blocks() -> str:
    """The characters of bars and curves, plain ones where the output's encoding lacks the others."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_BLOCKS
    return BLOCKS


def _colored(line: str, state: str) -> str:
    """Marks a line by the state of its run on a terminal that shows colours."""
    code = COLORS.get(state) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else None
    return line if code is None else f"\033[{code}m{line}\033[0m"


def _pause(seconds: float, size: os.terminal_size | None) -> None:
    """Waits; less if the terminal's size is no longer `size`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and (size is None or shutil.get_terminal_size() == size):
        time.sleep(min(left, 0.2))


Show = Callable[[list[str]], None]


@contextmanager
def _whole_screen() -> Iterator[Show]:
    """Draws in place on the terminal's second screen; leaves the first one as it was, with the last lines on it."""
    last: list[str] = []

    def show(lines: list[str]) -> None:
        last[:] = lines
        # Line over line and not from an empty screen, which would flicker.
        sys.stdout.write("\033[H" + "\033[K\n".join(lines) + "\033[K\033[J")
        sys.stdout.flush()

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    # SIGTERM would end Python without `finally`, and leave the terminal on its second screen without a cursor.
    before = signal.signal(signal.SIGTERM, end)
    sys.stdout.write("\033[?1049h\033[?25l\033[?7l")  # the second screen, no cursor, no line goes on in the next one
    try:
        yield show
    finally:
        sys.stdout.write("\033[?7h\033[?25h\033[?1049l" + "\n".join([*last, ""]))
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_screen() -> Iterator[Show]:
    """Prints block after block, for files and pipes."""
    yield lambda lines: print("\n".join([*lines, ""]), flush=True)
