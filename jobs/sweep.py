"""Sweeps: a grid of settings, each point a run of its own."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import overview, table
from jobs.run_folder import NAME, RunFolder


def points(grid: Sequence[str]) -> list[dict[str, str]]:
    """The product of axes such as `train.lr=1e-3,2e-3`: settings by name, the last axis running fastest.

    Raises ValueError for an axis that is none.
    """
    axes: dict[str, list[str]] = {}
    for axis in grid:
        name, equals, values = axis.partition("=")
        if not (name and equals and all(values.split(","))):
            raise ValueError(f"--grid takes SETTING=VALUE,VALUE,... such as train.lr=1e-3,2e-3; got {axis!r}")
        if name in axes:
            raise ValueError(f"--grid must name each setting once; got {name} twice")
        axes[name] = values.split(",")
    if not axes:
        raise ValueError("--grid needs at least one SETTING=VALUE,VALUE,...; got none")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def arguments(point: dict[str, str]) -> list[str]:
    """The point as on the command line; the values of a list are separated by spaces."""
    return [word for name, value in point.items() for word in (f"--{name.replace('_', '-')}", *value.split())]


def run_name(sweep: str, index: int) -> str:
    return f"{sweep}-{index:03d}"


def runs_of(sweep: str, runs_dir: Path) -> list[RunFolder]:
    """The runs of the sweep S or EXPERIMENT/S, in order; [] if there is no such sweep."""
    folder, _, name = sweep.rpartition("/")
    if not NAME.fullmatch(name) or folder.startswith("/"):
        return []
    found = [RunFolder(path.parent) for path in runs_dir.glob(f"{folder or '*'}/{name}-[0-9]*/launch.json")]
    return sorted((run for run in found if run.read_launch().get("sweep") == name), key=lambda run: run.path.name)


def by_loss(runs: Sequence[RunFolder], jobs: overview.Jobs | None) -> list[dict[str, Any]]:
    """What `status` shows of a sweep's runs, the smallest loss first; `point` holds the settings that differ."""
    entries = [asdict(overview.summarize(run, jobs)) | {"point": run.read_launch()["point"]} for run in runs]
    return sorted(entries, key=lambda entry: math.inf if entry["loss"] is None else entry["loss"])


def render(entries: Sequence[dict[str, Any]], width: int) -> str:
    """A table in lines of at most `width` characters, with a column for each setting of the grid."""
    settings = list(entries[0]["point"])
    rows = []
    for entry in entries:
        state = f"{entry['state']} ({entry['reason']})" if entry["reason"] else entry["state"]
        step = f"{entry['step']}/{entry['total']}" if entry["total"] is not None else ""
        loss = f"{entry['loss']:.5f}" if entry["loss"] is not None else ""
        rows.append((entry["run"], *(entry["point"].get(name, "") for name in settings), loss, state, step))
    headers = ("RUN", *settings, "LOSS", "STATE", "STEP")
    return table.render(headers, rows, width=width, names={"RUN"}, texts={"STATE"})
