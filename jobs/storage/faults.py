"""faults.jsonl: what has stopped a run without anybody's wish, and whether it was tried again.

A step is a pure function. So the same exception at the same step twice is the code's fault and ends the run. Anything
else may be the machine's (a killed process, a lost node, a failing network or disk), and the run is tried again, as
often as its budget allows without progress. Progress is a newer checkpoint.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.files import write_json
from jobs.storage import checkpoints
from jobs.storage.records import now, read_jsonl
from jobs.storage.run_folder import RunFolder, State

TWICE = 2
"""A node on which so many jobs of a run have died without progress is left out."""
HANG = "hang"
"""The folder below the run's for the stacks of processes that hung."""
HUNG = re.compile(
    r"process \d+ on (?P<node>\S+): no progress for (?P<silent_s>\d+) s in (?:step (?P<step>\d+)|[^,]+)(?P<state>, .+)?"
)
"""The first line of each of these files (jobs/health/watcher.py)."""
WITHOUT_A_WORD = "died without a word"
"""The cause where nobody knows one."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One end that nobody wished."""

    time: str
    cause: str
    """One line."""
    node: str | None
    """Where it began, if that is known."""
    checkpoint: int
    """The step of the newest checkpoint at that time."""
    again: bool
    """Whether the run was tried again."""
    left_out: Sequence[str] = ()
    """Nodes that are left out from then on."""
    traceback: str | None = None
    hang: str | None = None
    """The folder below the run's where the stacks of its processes are, if they hung."""

    @property
    def silent_s(self) -> int:
        """For how many seconds nothing had happened when a hang was noticed."""
        found = HUNG.fullmatch(self.cause.removeprefix("hung: "))
        return 0 if found is None else int(found["silent_s"])


def read(run: RunFolder) -> list[Fault]:
    """Reads all faults since a person has started or continued the run."""
    lines: list[dict[str, Any]] = []
    for line in read_jsonl(_path(run)):
        lines = [] if "continued" in line else [*lines, line]
    return [Fault(**line) for line in lines]


def forgive(run: RunFolder) -> None:
    """Gives the run a new budget, because a person continues it."""
    seen = [folder.name for folder in _hangs(run)]
    if _path(run).exists() or seen:
        _append(run, {"continued": now(), "hangs": seen})


def judge(run: RunFolder, budget: int, cause: str | None, node: str | None) -> Fault | None:
    """Decides whether a run is tried again whose processes have ended badly, and writes that down.

    `cause` is what is known from outside, such as a signal that has ended a process, and `node` where. Returns None if
    the end is no such fault: the run has come to an end of its own, or was used wrongly.
    """
    status, failure = run.read_status(), run.read_failure()
    # Created, too: a process may die before it has written the first status.json.
    if "state" in failure or run.state() not in (State.CREATED, State.QUEUED, State.RUNNING, State.REQUEUED):
        return None
    trace: str | None = failure.get("traceback")
    past, checkpoint = read(run), next(iter(checkpoints.steps(run.checkpoints)), 0)
    tries = [fault for fault in past if fault.checkpoint == checkpoint]
    hang = new_hang(run)
    # A fault of the machine may come twice at the same step: only the number of tries ends it.
    own = trace if hang is None and not failure.get("outside") else None
    # Without a step in the traceback, two faults are the same only if no checkpoint was made between them.
    among = past if own is not None and own.startswith("In step ") else tries
    first = next((fault for fault in among if _same(fault.traceback, own)), None)
    if hang is not None:
        cause, node = describe_hang(hang)
    elif own is not None or cause is None:
        cause = trace.strip().splitlines()[-1] if trace is not None else WITHOUT_A_WORD
        node = failure.get("node", node)
    nodes = [fault.node for fault in tries] + [node]
    dead = {node for node in nodes if node is not None and nodes.count(node) >= TWICE}
    left_out = sorted(dead.union(*(fault.left_out for fault in past)))
    again = first is None and len(tries) < budget
    fault = Fault(
        time=now(),
        cause=cause,
        node=node,
        checkpoint=checkpoint,
        again=again,
        left_out=left_out,
        traceback=trace,
        hang=None if hang is None else f"{HANG}/{hang.name}",
    )
    # Nothing is counted before all else is written: if the disk is full, all of this is done again.
    if again:
        write_json(run.status, {**status, "state": State.REQUEUED, "updated": now()})
    elif first is not None:
        fail(run, f"{first.traceback}\nAnd after a new start, at the same step again:\n\n{trace}")
    else:
        count = f"; {len(tries)} new start{'s' if len(tries) > 1 else ''} brought no progress" if tries else ""
        fail(run, f"{trace or ''}\n{cause}{count}".lstrip())
    _append(run, asdict(fault))
    if again:
        run.clear_failure()  # the next job may die before it does that
    return fault


def new_hang(run: RunFolder) -> Path | None:
    """Returns the folder of stacks of a job that has hung, if nobody has taken note of it yet."""
    lines = read_jsonl(_path(run))
    known = {Path(line["hang"]).name for line in lines if line.get("hang")}.union(*(x.get("hangs", ()) for x in lines))
    return next((folder for folder in _hangs(run) if folder.name not in known), None)


def _hangs(run: RunFolder) -> list[Path]:
    """Returns all folders of stacks, newest first."""
    return sorted((run.path / HANG).glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)


def describe_hang(folder: Path) -> tuple[str, str | None]:
    """Says which process of a job that hung is behind, and on which node: one that is stopped, or has done least."""
    heads = [path.read_text().partition("\n")[0] for path in sorted(folder.glob("process-*.txt"))]
    found = [match for head in heads if (match := HUNG.fullmatch(head)) is not None]
    if not found:
        return "a process hung", None
    doing = [int(match["step"]) if match["step"] else -1 for match in found]
    behind = min(range(len(found)), key=lambda i: (found[i]["state"] is None, doing[i]))
    return f"hung: {found[behind][0]}", found[behind]["node"]


def fail(run: RunFolder, trace: str) -> None:
    """Writes down that the run has failed for good."""
    rank = run.read_failure().get("failed_rank")
    status = {**run.read_status(), "state": State.FAILED, "failed_rank": rank, "traceback": trace, "updated": now()}
    write_json(run.status, status)


def _same(trace: str | None, other: str | None) -> bool:
    """Whether two tracebacks, which name the step, are of one and the same exception; addresses may differ."""
    return trace is not None and other is not None and _plain(trace) == _plain(other)


def _plain(trace: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", trace)


def _path(run: RunFolder) -> Path:
    return run.path / "faults.jsonl"


def _append(run: RunFolder, values: dict[str, Any]) -> None:
    with _path(run).open("a") as file:
        file.write(json.dumps(values) + "\n")
