"""Shows how far a job is: a bar on a terminal, a line now and then in a file."""

import os
import sys
import time

from tqdm import tqdm

from jobs.terminal import tables
from jobs.terminal.console import Console

LOG_LINE_S = 30.0


class Progress:
    """Shows work that is counted in steps: a bar on a terminal, a line every 30 s in a file."""

    def __init__(self, console: Console, label: str, total: int, done: int, unit: str, per_step: int) -> None:
        self._console = console
        self._label, self._total, self._unit, self._per_step = label, total, unit, per_step
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            disable=not sys.stderr.isatty() or os.environ.get("TERM") == "dumb",  # as screen readers have it
            dynamic_ncols=True,
            # Without tqdm's own rate: it counts steps, and from before the network was compiled.
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} {elapsed}<{remaining}",
        )
        self._said = time.monotonic()
        self.restart_clock(done)

    def restart_clock(self, step: int) -> None:
        """Counts rates from here on."""
        self._window = [(time.monotonic(), step)]

    def update(self, step: int, detail: str) -> None:
        """Is called after `step` steps; `detail` is shown beside the rate."""
        self._window = [*self._window[-30:], (time.monotonic(), step)]
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        shown = f"{detail} {rate} {self._unit}/s".strip()
        # No refresh: the next call draws, if it is time; there may be hundreds of steps a second.
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if time.monotonic() - self._said >= LOG_LINE_S:
            self._said = time.monotonic()
            line = f"{self._label} {step:,}/{self._total:,} {shown}, {tables.duration(self.eta_s(step)) or '?'} left"
            self._console.log(line)
            if self._bar.disable:
                print(line, flush=True)

    @property
    def rate(self) -> float:
        """The units per second over the last updates."""
        (t0, first), (t1, last) = self._window[0], self._window[-1]
        return (last - first) * self._per_step / (t1 - t0) if t1 > t0 else 0.0

    def eta_s(self, step: int) -> float | None:
        """Returns the seconds to the end, None before a rate is known."""
        return (self._total - step) * self._per_step / self.rate if self.rate else None

    def close(self) -> None:
        self._bar.close()
