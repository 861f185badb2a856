"""How the wall time of a run was spent since it was first submitted, from what its files say.

Lines of timing.jsonl mark where a part of the time ends and the next one begins: `queued` (submitted), `start`, `begin`
(of the steps), `progress`, `figures`, and the state in which a job ends. A job that is killed writes no last line; the
next start writes down when the run was last `heard` of, and the step that it had `reached`.

Whoever finds that a run hangs appends {"event": "hung", "seconds": S}: for so long nothing has happened.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobs.storage.records import last_step, read_jsonl
from jobs.storage.run_folder import RunFolder, State

PARTS = {
    "useful": "useful steps",
    "redone": "redone steps",
    "saving": "saving",
    "figures": "figures",
    "starting": "starting",
    "compiling": "compiling",
    "queued": "queued",
    "stopped": "stopped",
    "hung": "hung",
}
"""The parts of the time, and what people read. A stopped run waits until somebody continues it."""
WAITING = ("queued", "stopped")
"""Parts in which no job of the run is at work."""


@dataclass
class Account:
    """The seconds of each part, which are the whole time, and the steps that were done for the first time or again."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    useful_steps: int = 0
    redone_steps: int = 0

    @property
    def whole_s(self) -> float:
        return sum(self.seconds.values())


def account(
    lines: Sequence[Mapping[str, Any]],
    *,
    created: str | None,
    heard: str | None,
    reached: int,
    now: str | None,
    waits: bool,
) -> Account:
    """Books the time from `created` until now; of a dead run, whose `now` is None, until its last sign of life.

    `lines` are those of timing.jsonl, all times are as files have them. `heard` and `reached` are the time and the step
    of the last sign of life; `waits` says that the run lives, but none of its jobs is at work.
    """
    if created is None and not lines:
        return Account()
    books = _Books(_seconds(created or lines[0]["time"]))
    for line in lines:
        with suppress(LookupError, TypeError, ValueError):  # somebody has edited it
            books.read(line)
    if now is None or waits:
        # A dead run has nothing booked after this, so `then` is that of a run that waits for its next job.
        books.end_of_job(heard, reached, then="queued")
    if now is not None:
        books.until(_seconds(now), reached)
    return books.account


def of_run(run: RunFolder, launch: Mapping[str, Any], status: Mapping[str, Any], now: str | None) -> Account:
    """Books the time of a run; `status` with its true state, `now` is None if it does not live."""
    return account(
        read_jsonl(run.timing),
        created=launch.get("created"),
        heard=status.get("updated"),
        # After a kill, either file may be ahead: the heartbeat comes every few seconds, and not every step has a line.
        reached=max(status.get("step", 0), last_step(run.metrics)),
        now=now,
        waits=status["state"] in (State.QUEUED, State.REQUEUED),
    )


class _Books:
    """An account while it is made: how far it is in time, which part goes on, and the step of the present job."""

    def __init__(self, time: float) -> None:
        self.account = Account()
        self._time = time
        self._part = "starting"
        self._step = self._highest = 0
        self._saved_s = 0.0  # by the present job

    def read(self, line: Mapping[str, Any]) -> None:
        event, time = line["event"], _seconds(line["time"])
        if event == "queued":
            # A first submission has no `heard`. If there is one, nobody had continued the run since then.
            self.end_of_job(line.get("heard"), None, then="stopped" if "heard" in line else "starting")
            self._begin("queued", time)
        elif event == "start":
            # After a kill, the run has waited for this start: on Slurm in the queue, here until somebody continued it.
            again = "stopped" if line["restarts"] else "starting"
            self.end_of_job(line.get("heard"), line.get("reached"), then="queued" if line.get("on_slurm") else again)
            # The process is older than its line: it had to import torch first. Older versions do not say by how much.
            self._begin("starting", _seconds(line.get("began", line["time"])))
            self._step, self._saved_s = line["step"], 0.0
            self._highest = max(self._highest, self._step)
            self.until(time)
        elif event == "begin":
            # The line is written when compiling has ended.
            self._begin("compiling", time - line["compile_s"])
            self._begin("steps", time)
        elif event == "progress":
            # `checkpoint_s` is the mean over the steps since the line before.
            self.until(time, line["step"], line["checkpoint_s"] * (line["step"] - self._step))
        elif event == "hung":
            part = self._part
            self._begin("hung", time - line["seconds"])
            self._begin(part, time)
        elif event == "figures" or event in list(State):
            # Here it is the sum over the whole job, most of which its lines of progress have booked already.
            self.until(time, line["step"], line["checkpoint_wait_s"] - self._saved_s)
            self._part = {"figures": "figures", State.REQUEUED: "queued"}.get(event, "stopped")

    def _begin(self, part: str, time: float) -> None:
        self.until(time)
        self._part = part

    def until(self, time: float, reached: int | None = None, saving_s: float = 0.0) -> None:
        """Books the time until then as the part that goes on, in which the job has come to step `reached`."""
        spent, self._time = max(0.0, time - self._time), max(time, self._time)  # clocks of two nodes may differ
        step = max(self._step, reached or 0)
        done, useful = step - self._step, max(0, step - self._highest)
        if done and self._part == "starting":
            self._part = "steps"  # older versions did not mark where they begin
        if self._part == "steps":
            saving_s = max(0.0, min(saving_s, spent))
            # Of these steps, those below the highest one so far are done again: the time is shared in proportion.
            # Without a new step, the time goes to the step that is at work: done again if the run had been further.
            share = useful / done if done else float(step >= self._highest)
            self._book("saving", saving_s)
            self._book("useful", share * (spent - saving_s))
            self._book("redone", (1 - share) * (spent - saving_s))
            self._saved_s += saving_s
        else:
            self._book(self._part, spent)
        self.account.useful_steps += useful
        self.account.redone_steps += done - useful
        self._step, self._highest = step, max(self._highest, step)

    def end_of_job(self, heard: str | None, reached: int | None, then: str) -> None:
        """Ends the present job when it was last heard of, unless it has said itself when it ended."""
        at_work = self._part not in WAITING
        self.until(_seconds(heard) if at_work and heard is not None else self._time, reached)
        if at_work:
            self._part = then

    def _book(self, part: str, seconds: float) -> None:
        self.account.seconds[part] += seconds


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
