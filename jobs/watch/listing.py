"""All runs in a table, for `status`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.storage.run_folder import RunFolder
from jobs.terminal import tables
from jobs.watch.states import Overview

COLUMNS = ("RUN", "STATE", "STEP", "LOSS", "IMG/S", "LEFT", "RST", "NODES")


def runs(runs_dir: Path) -> list[RunFolder]:
    """Returns all runs in the folder of all runs."""
    return [RunFolder(path.parent) for path in runs_dir.glob("[!.]*/[!.]*/experiment.json")]


def by_last_update(overviews: Iterable[Overview]) -> list[Overview]:
    """Sorts runs so that the newest is last, next to the terminal's prompt."""
    return sorted(overviews, key=lambda overview: overview.updated)


def render(overviews: Sequence[Overview], width: int) -> str:
    """Shows the runs as a table in lines of at most `width` characters."""
    rows = [
        (
            o.run,
            f"{o.state} ({o.reason})" if o.reason else o.state,
            f"{_count(o.step)}/{_count(o.total)}" if o.total is not None else "",
            f"{o.loss:.4f}" if o.loss is not None else "",
            f"{o.rate_images_per_s:.0f}" if o.rate_images_per_s is not None else "",
            tables.duration(o.eta_s),
            str(o.restarts),
            o.nodes,
        )
        for o in overviews
    ]
    return tables.render(COLUMNS, rows, width=width, names={"RUN", "NODES"}, texts={"STATE"})


def _count(number: int | None) -> str:
    """Writes a number of steps; from 10,000 on, whole thousands as in 40k."""
    if number is None:
        return "?"
    return f"{number // 1000}k" if number >= 10_000 and number % 1000 == 0 else str(number)
