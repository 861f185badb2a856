"""faults.jsonl: what has stopped a run without anybody's wish, and whether it was tried again.

A step is a pure function. So the same exception at the same step twice is the code's fault and ends the run. Anything
else may be the machine's (a killed process, a lost node, a failing network or disk), and the run is tried again, as
often as its budget allows without progress. Progress is a newer checkpoint.

A set of samples has such a file, too: there a shard is what a step is, and a new one is progress.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusion.errors import UserError
from jobs.files import write_json
from jobs.storage import checkpoints
from jobs.storage.job_ids import number
from jobs.storage.records import append, now, read_jsonl
from jobs.storage.run_folder import RunFolder, State

FILE = "faults.jsonl"
PLACES = ("In step ", "In evaluation ", "In unit ")
"""A traceback that names what was being done begins with one of these; each of them is a pure function."""
TWICE = 2
"""A node on which so many jobs of a run have died without progress is left out."""
REPAIRED_S = 30 * 24 * 3600
"""A node may have been repaired since a fault that is older."""
HANG = "hang"
"""The folder below the run's for the stacks of processes that hung."""
HUNG = re.compile(
    r"process \d+ on (?P<node>\S+): no progress for (?P<silent_s>\d+) s in (?:step (?P<step>\d+)|[^,]+)(?P<state>, .+)?"
)
"""The first line of each of these files (jobs/health/watcher.py)."""
FULL_S = (10, 60, 300)
"""If the disk is full: the pauses before what must not be lost is written again."""
LONG_FULL_S = (*FULL_S, *11 * (300,))
"""The same for what waits beside a job and holds up nobody."""
T = TypeVar("T")
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
    checkpoint: int = 0
    """The step of the newest checkpoint at that time."""
    left: str = ""
    """What a share of a set of samples had still to do."""
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
    return _read(run.path)


def _read(folder: Path) -> list[Fault]:
    lines: list[dict[str, Any]] = []
    for line in read_jsonl(folder / FILE):
        lines = [] if "continued" in line else [*lines, line]
    return [_fault(line) for line in lines]


def _fault(line: dict[str, Any]) -> Fault:
    """Makes a fault of its line, without what only later versions know."""
    known = {field.name for field in fields(Fault)}
    return Fault(**{name: value for name, value in line.items() if name in known})


def bad_nodes(folder: Path) -> dict[str, Fault]:
    """Returns the nodes that the run or the set in this folder has left out lately, with the newest fault on each."""
    # All lines, also those before a person has continued the run: that gives a new budget and repairs no node.
    found = [_fault(line) for line in read_jsonl(folder / FILE) if line.get("time", "") >= now(REPAIRED_S)]
    left_out = {node for fault in found for node in fault.left_out}
    return {fault.node: fault for fault in found if fault.node in left_out}


def forgive(run: RunFolder) -> None:
    """Gives the run a new budget, because a person continues it."""
    forgive_set(run.path)


def forgive_set(folder: Path) -> None:
    """Gives a set of samples a new budget, because a person starts to work on it again."""
    for failure in folder.glob(".failure-*.json"):
        failure.unlink(missing_ok=True)
    # The stacks stay for people to read. Without their names here, the next fault would be taken for an old hang.
    seen = [hang.name for hang in _hangs(folder)]
    if (folder / FILE).exists() or seen:
        append(folder / FILE, {"continued": now(), "hangs": seen})


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def patiently(decide: Callable[[], T], say: Callable[[str], None] = _to_stderr, *, long: bool = False) -> T:
    """Returns what `decide` does. If it cannot write that down, it is called again later: the disk may be full.

    That is for six minutes, or for an hour if it is `long`.
    """
    for pause_s in LONG_FULL_S if long else FULL_S:
        try:
            return decide()
        except OSError as error:
            say(f"{error}; trying again in {pause_s} s")
            time.sleep(pause_s)
    return decide()


def judge(
    run: RunFolder, budget: int, cause: str | None, node: str | None, begun: str = "", *, stays: bool = False
) -> Fault | None:
    """Decides whether a run is tried again whose processes have ended badly, and writes that down.

    `cause` is what is known from outside, such as a signal that has ended a process, and `node` where. Returns None if
    the end is no such fault: the run has come to an end of its own, or a person must change something. A status from
    before they have `begun` says nothing of them. A job that `stays` on its machine leaves out no node.
    """
    status, failure = run.read_status(), run.read_failure()
    # Created, too: a process may die before it has written the first status.json.
    goes_on = run.state() in (State.CREATED, State.QUEUED, State.RUNNING, State.REQUEUED)
    # What a process has written down as the end may be the echo of another one's, which was killed.
    has_failed = run.state() == State.FAILED and "state" in failure
    is_echo = cause is not None and has_failed and bool(failure.get("outside")) and not failure.get("for_good")
    # Times compare as text: all are ISO 8601 in UTC, with as many digits.
    if not is_echo and ("state" in failure or not (goes_on or status.get("updated", "") < begun)):
        return None
    checkpoint = next(iter(checkpoints.steps(run.checkpoints)), 0)
    fault, first, tries = _weigh(
        run.path, budget, cause, node, failure, new_hang(run.path), stays, checkpoint=checkpoint
    )
    # Nothing is counted before all else is written: if the disk is full, all of this is done again.
    if fault.again:
        write_json(run.status, {**status, "state": State.REQUEUED, "updated": now()})
    elif first is not None:
        fail(run, f"{first.traceback}\nAnd after a new start, at the same step again:\n\n{fault.traceback}")
    else:
        count = f"; {tries} new start{'s' if tries > 1 else ''} brought no progress" if tries else ""
        fail(run, f"{fault.traceback or ''}\n{fault.cause}{count}".lstrip(), is_echo=is_echo)
    append(run.path / FILE, asdict(fault))
    if fault.again:
        run.clear_failure()  # the next job may die before it does that
    return fault


def judge_share(
    failure_file: Path, left: str, budget: int, cause: str | None, node: str | None, own: str | None
) -> Fault:
    """Decides the same for a share of a set of samples, which `own` is the Slurm job of, if one is.

    `failure_file` lies in the folder of the set, and `write_failure` has written it, unless the share was killed.
    """
    folder = failure_file.parent
    try:
        failure = json.loads(failure_file.read_text())
    except (OSError, ValueError):
        failure = {}
    # Other shares of the set may hang, too. The name of the folder of stacks ends in that of the job's port file.
    hang = new_hang(folder, "" if own is None else f"-{number(own)}_port_")
    fault, _, _ = _weigh(folder, budget, cause, node, failure, hang, own is None, left=left)
    if failure.get("for_good"):
        fault = replace(fault, again=False)
    append(folder / FILE, {name: value for name, value in asdict(fault).items() if name != "checkpoint"})
    failure_file.unlink(missing_ok=True)
    return fault


def is_given_up(folder: Path, left: str) -> bool:
    """Whether a share of a set of samples that has this left to do must not be tried again."""
    return any(fault.left == left and not fault.again for fault in _read(folder))


def write_failure(path: Path, **facts: Any) -> bool:
    """Records why a process of a share has failed, if it is the first of them; returns whether it is."""
    try:
        with path.open("x") as file:
            json.dump(facts, file)
    except FileExistsError:
        return False
    except OSError:  # the disk may be full; then the terminal must do
        return True
    return True


def _weigh(
    folder: Path,
    budget: int,
    cause: str | None,
    node: str | None,
    failure: dict[str, Any],
    hang: Path | None,
    stays: bool,
    *,
    checkpoint: int = 0,
    left: str = "",
) -> tuple[Fault, Fault | None, int]:
    """Returns the fault, the first of the same kind if it is the code's, and how many tries brought no progress."""
    trace: str | None = failure.get("traceback")
    past = _read(folder)
    tries = [fault for fault in past if (fault.checkpoint, fault.left) == (checkpoint, left)]
    # A fault of the machine may come twice at the same step: only the number of tries ends it.
    own = trace if hang is None and not failure.get("outside") else None
    # Without a step in the traceback, two faults are the same only if nothing was done between them.
    among = past if own is not None and own.startswith(PLACES) else tries
    first = next((fault for fault in among if _same(fault.traceback, own)), None)
    if hang is not None:
        cause, node = describe_hang(hang)
    # An exception of our own says more than the signal that followed it. One of the network may only be the echo of a
    # process that was killed elsewhere: then what is seen from outside comes first.
    elif own is not None or cause is None:
        cause = trace.strip().splitlines()[-1] if trace is not None else WITHOUT_A_WORD
        node = failure.get("node", node)
    nodes = [fault.node for fault in tries] + [node]
    dead = {node for node in nodes if node is not None and nodes.count(node) >= TWICE}
    # Also those of earlier faults: progress on another node says nothing of these.
    left_out = [] if stays else sorted(dead.union(*(fault.left_out for fault in past)))
    again = first is None and len(tries) < budget
    fault = Fault(
        time=now(),
        cause=cause,
        node=node,
        checkpoint=checkpoint,
        left=left,
        again=again,
        left_out=left_out,
        traceback=trace,
        hang=None if hang is None else f"{HANG}/{hang.name}",
    )
    return fault, first, len(tries)


def new_hang(folder: Path, of: str = "") -> Path | None:
    """Returns the newest folder of stacks of a job that has hung, with `of` in its name, if nobody has noted it yet."""
    lines = read_jsonl(folder / FILE)
    known = {Path(line["hang"]).name for line in lines if line.get("hang")}.union(*(x.get("hangs", ()) for x in lines))
    return next((hang for hang in _hangs(folder) if hang.name not in known and of in hang.name), None)


def _hangs(folder: Path) -> list[Path]:
    """Returns all folders of stacks, newest first."""
    return sorted((folder / HANG).glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)


def describe_hang(folder: Path) -> tuple[str, str | None]:
    """Says which process of a job that hung is behind, and on which node.

    That is one that is stopped or dead; else one that waits for a disk or a network, which may be over in a moment;
    else the one that has done least.
    """
    heads = [path.read_text().partition("\n")[0] for path in sorted(folder.glob("process-*.txt"))]
    found = [match for head in heads if (match := HUNG.fullmatch(head)) is not None]
    if not found:
        return "a process hung", None
    doing = [int(match["step"]) if match["step"] else -1 for match in found]
    states = [match["state"] for match in found]
    behind = min(range(len(found)), key=lambda i: (states[i] is None, "waiting" in (states[i] or ""), doing[i]))
    return f"hung: {found[behind][0]}", found[behind]["node"]


def is_trained(run: RunFolder) -> bool:
    """Whether the run's last step is saved: then it is finished, whatever has ended its processes since.

    Figures and final numbers, which alone can be missing, decide over no run. A loss that was not finite does.
    """
    if run.read_failure().get("for_good"):
        return False
    try:
        checkpoints.verify(run.checkpoints, run.read_experiment()[1].train.steps)
    except UserError:
        return False
    return True


def finish(run: RunFolder, cause: str) -> bool:
    """Writes down that a run is finished if it is trained; returns whether it is."""
    if not is_trained(run):
        return False
    if (status := run.read_status()).get("state") != State.FINISHED:
        steps = run.read_experiment()[1].train.steps
        missing = f"figures and final numbers were not drawn ({cause}); the same command draws them again"
        state = {"state": State.FINISHED, "step": steps, "eta_s": None, "missing": missing, "updated": now()}
        with suppress(OSError):  # the disk may be full; then the same command writes it
            write_json(run.status, {**status, **state})
    return True


def fail(run: RunFolder, trace: str, *, is_echo: bool = False) -> None:
    """Writes down that the run has failed for good; the process that failed first is not named if it is an echo."""
    rank = None if is_echo else run.read_failure().get("failed_rank")
    status = {**run.read_status(), "state": State.FAILED, "failed_rank": rank, "traceback": trace, "updated": now()}
    write_json(run.status, status)


def _same(trace: str | None, other: str | None) -> bool:
    """Whether two tracebacks, which name the step, are of one and the same exception; addresses may differ."""
    return trace is not None and other is not None and _plain(trace) == _plain(other)


def _plain(trace: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", trace)
