"""Puts a report together: what the runs' folders say, their curves, and the page that shows both."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffusion.errors import UserError
from jobs.evaluate.report import MetricRow
from jobs.experiments.experiment_json import unlike
from jobs.report import contents, curves
from jobs.report.contents import Content
from jobs.sample import classes
from jobs.sample.sample_set import DRAWN
from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder
from jobs.terminal.tables import duration, setting
from jobs.tracking.server import public
from jobs.watch.states import SlurmJob

BOKEH = Resources(mode="inline", components=["bokeh"], log_level="error")
"""Its code without widgets, tables, 3D and mathematics, which would be twice as much."""
FACTS = (
    "gpu",
    "device",
    "processes",
    "grad_shards",
    "precision",
    "compile",
    "threads",
    "cpu",
    "driver",
    "cuda",
    "cudnn",
    "nccl",
)
"""What is said of a machine, in this order."""
NARROW, WIDE = 700, 1200
"""Pixels of a picture: where several runs share the page, and where one has it."""


def render(runs: Sequence[RunFolder], jobs: Mapping[str, SlurmJob] | None) -> str:
    """Returns a page about one run, or about several and how they compare; `jobs` is what Slurm says of all their jobs.

    Everything is inside it, and it asks no server for anything. Raises UserError if a run's settings cannot be read.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("report compares different runs; one of these is given twice")
    found = [contents.read(run, jobs, WIDE if len(runs) == 1 else NARROW) for run in runs]
    if len({run.label for run in found}) < len(found):  # of several folders of all runs
        found = [replace(run, label=run.detail["path"]) for run in found]
    most = curves.points_of(len(found))
    # All figures in one call, so that Bokeh writes its data once; the names say whose they are.
    figures = {f"{i}/{title}": plot for i, run in enumerate(found) for title, plot in curves.of_run(run, most).items()}
    if len(found) > 1:
        figures |= {f"all/{title}": plot for title, plot in curves.compared(found).items()}
    script, places = components(figures) if figures else ("", {})

    def plots(of: object) -> dict[str, Markup]:
        """The places of the figures of a run, or of all, by their titles."""
        keys = {name.partition("/")[2]: name for name in places if name.partition("/")[0] == str(of)}
        return {title: Markup(places[name]) for title, name in keys.items()}

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # Not isinstance: Markup is a str, too, and in Bokeh's code nothing may be replaced.
        finalize=lambda value: public(value) if type(value) is str else value,  # whatever it is that the page says
        # A misspelt name must fail: by default Jinja writes nothing in its place.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "moment": _moment,
        "setting": setting,
        "classes": lambda told: classes.label(tuple(told)),
    }
    page = environment.get_template("page.html.jinja")
    return page.render(
        runs=found,
        made=datetime.now(UTC),
        plots=plots,
        note=curves.note(found),
        bokeh=[Markup(code) for code in BOKEH.js_raw] if figures else [],
        script=Markup(script),
        differing=differing(found),
        unlike=unlike([run.config for run in found]),
        measured=measured(found),
        events=events,
        machine=machine,
        hashes=hashes,
        zip=zip,  # Jinja has none
    )


def differing(runs: Sequence[Content]) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ by their flags, and the value of each run."""
    flags = sorted(set().union(*(run.settings for run in runs)))
    values = {flag: [run.settings.get(flag) for run in runs] for flag in flags}
    return {flag: found for flag, found in values.items() if any(value != found[0] for value in found)}


def measured(runs: Sequence[Content]) -> dict[str, tuple[list[MetricRow | None], str]]:
    """Returns the metrics of the newest evaluation of each run by their labels, None where a run has none, and a floor.

    Floors depend on the number of samples: where these differ, all floors are named.
    """
    evaluated = [run.evaluated for run in runs]
    labels = {name: row.label for entry in evaluated if entry for name, row in entry.metrics.items()}
    found = {}
    for name, label in labels.items():
        rows = [entry.metrics.get(name) if entry else None for entry in evaluated]
        floors = {entry.num_judged: row.floor for entry, row in zip(evaluated, rows, strict=True) if entry and row}
        texts = [f"{floor} ({n:,} samples)" for n, floor in floors.items() if floor]
        found[label] = (rows, "; ".join(texts) if len(set(floors.values())) > 1 else next(iter(floors.values())))
    return found


def events(run: Content) -> list[Mapping[str, Any]]:
    """Returns starts and faults in the order of time."""
    found = []
    for line in run.starts:
        what = f"restart {line['restarts']}" if line.get("restarts") else "start"
        number = line.get("processes", 1)
        where = f"{number} x {line.get('gpu') or line.get('device', '')}"
        found.append({"time": line["time"], "what": what, "step": line["step"], "where": where})
    for fault in run.detail["faults"]:
        then = "tried again" if fault["again"] else "not tried again"
        what = f"{fault['cause']}; {then}"
        found.append({"time": fault["time"], "what": what, "step": fault["checkpoint"], "where": fault["node"] or ""})
    return sorted(found, key=lambda event: str(event["time"]))


def machine(run: Content) -> dict[str, Any]:
    """Returns the facts of the machine that computed last, on which bytes depend."""
    return {name.replace("_", " "): run.machine[name] for name in FACTS if run.machine.get(name) is not None}


def hashes(run: Content) -> dict[str, str]:
    """Returns the SHA-256 of the files of checkpoints and of samples by their paths in the run's folder."""
    found: dict[str, str] = {}
    for manifest in run.checkpoints:
        folder = checkpoints.folder_name(manifest["step"])
        found |= {f"checkpoints/{folder}/{name}": file["sha256"] for name, file in manifest["files"].items()}
    for samples in run.samples:
        found[f"samples/{samples.name}/{DRAWN}"] = samples.facts["sha256"][DRAWN]
    return found


def _moment(time: str | datetime) -> str:
    """Writes a time of a file for people, in UTC."""
    moment = datetime.fromisoformat(time) if isinstance(time, str) else time
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
