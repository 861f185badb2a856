"""Shows a sweep: its runs, the best first."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.experiments.experiment_json import unlike
from jobs.storage import run_folder
from jobs.storage.run_folder import NAME, RunFolder
from jobs.terminal import tables
from jobs.watch import states


def named(name: str, runs_dir: Path) -> list[RunFolder]:
    """Returns the runs of a sweep, or the run of this name; raises UserError if there is none."""
    return runs_of(name, runs_dir) or [run_folder.find(name, runs_dir)]


def runs_of(sweep: str, runs_dir: Path) -> list[RunFolder]:
    """Returns the runs of the sweep S or EXPERIMENT/S, in order; [] if there is no such sweep, or a folder is meant."""
    folder, _, name = sweep.rpartition("/")
    # Anything else would be a pattern to `Path.glob`.
    if Path(sweep).is_dir() or not NAME.fullmatch(name) or not (sweep == name or NAME.fullmatch(folder)):
        return []
    found = [RunFolder(path.parent) for path in runs_dir.glob(f"{folder or '*'}/{name}-[0-9]*/launch.json")]
    # The name alone does not tell: a user may have called any run so.
    mine = (run for run in found if states.read_launch(run).get("sweep") == name)
    return sorted(mine, key=lambda run: run.path.name)


def by_loss(runs: Sequence[RunFolder], jobs: states.Jobs | None) -> list[dict[str, Any]]:
    """Returns what `status` shows of a sweep's runs, smallest loss first; `point` holds the settings that differ.

    Runs whose losses measure different things (`unlike`) stay in the order of the grid.
    """
    entries = [asdict(states.summarize(run, jobs)) | {"point": run.read_launch()["point"]} for run in runs]
    if unlike([run.read_experiment()[1] for run in runs]):
        return entries
    return sorted(entries, key=lambda entry: math.inf if entry["loss"] is None else entry["loss"])


def render(entries: Sequence[dict[str, Any]], width: int) -> str:
    """Shows the runs as a table of at most `width` characters, with a column for each setting of the grid."""
    settings = list(entries[0]["point"])
    rows = []
    for entry in entries:
        state = f"{entry['state']} ({entry['reason']})" if entry["reason"] else entry["state"]
        step = f"{entry['step']}/{entry['total']}" if entry["total"] is not None else ""
        loss = f"{entry['loss']:.5f}" if entry["loss"] is not None else ""
        rows.append((entry["run"], *(entry["point"].get(name, "") for name in settings), loss, state, step))
    headers = ("RUN", *settings, "LOSS", "STATE", "STEP")
    return tables.render(headers, rows, width=width, names={"RUN"}, texts={"STATE"})
