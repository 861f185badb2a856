"""What a report says of one run: from the run's folder, and from what Slurm says of its jobs."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from jobs.evaluate import report
from jobs.evaluate.plan import Evaluation
from jobs.experiments import experiment_json
from jobs.experiments.configs import ExperimentConfig
from jobs.report.pictures import Picture, leads_out, picture
from jobs.sample import sample_set
from jobs.storage import account, checkpoints
from jobs.storage.records import read_jsonl, starts
from jobs.storage.run_folder import RunFolder
from jobs.terminal.tables import duration
from jobs.watch import detail, states

Json = dict[str, Any]

SETS = 3
"""So many sets of samples are shown, the newest ones."""
STRIPS = {"figures/denoising.png": "From noise to samples", "figures/reverse.png": "From noise to samples"}
"""Pictures of how samples come about, with what they show: of images, and of one dimension."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A complete set of samples, with its evaluation if it has one."""

    name: str
    facts: Json
    """What its manifest says."""
    pictures: list[Picture]
    metrics: dict[str, report.MetricRow]
    tables: dict[str, dict[str, list[str]]]
    """Cells by the title of their table, then by column."""
    legend: str
    num_judged: int
    """Samples that the metrics rest on."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report says of one run."""

    label: str
    experiment: str
    config: ExperimentConfig
    detail: Json
    """What `status RUN --json` prints."""
    launch: Json
    command: str
    """The command line as it is typed."""
    changed_files: list[str]
    """Files that differed from the commit when the run was started."""
    history: list[Json]
    timing: list[Json]
    quality: list[Json]
    """What was judged while it trained (--train.evaluate-every)."""
    pictures: list[Picture]
    samples: list[Samples]
    left_out: list[str]
    """Names of older sets of samples, which are not shown."""
    unknown: list[str]
    """Names of sets whose manifests do not say what the page does: of another version, or damaged."""
    checkpoints: list[Json]
    """The manifests of the checkpoints that are there, newest first."""

    @property
    def starts(self) -> list[Json]:
        """What timing.jsonl says of starts: machine, processes, precision."""
        return starts(self.timing)

    @property
    def machine(self) -> Json:
        """The facts of the last start; {} before the first."""
        return self.starts[-1] if self.starts else {}

    @property
    def floor(self) -> float | None:
        """The smallest loss that any network can reach, None where nobody knows it."""
        found: float | None = self.machine.get("loss_floor")
        return found

    @property
    def settings(self) -> Json:
        """Every setting by its flag."""
        return experiment_json.flags(self.config)

    @property
    def evaluated(self) -> Samples | None:
        """The newest set that has been evaluated."""
        return next((entry for entry in self.samples if entry.metrics), None)

    @property
    def parts(self) -> list[tuple[str, str, float, str]]:
        """(part, what people read, percent, duration) of the time that the run has taken."""
        time = self.detail["time"]
        spent = [(part, name, time["seconds"][part]) for part, name in account.PARTS.items()]
        # A shorter part would be read as 0 s.
        return [(part, name, 100 * s / time["whole_s"], duration(s)) for part, name, s in spent if s >= 0.5]


def read(run: RunFolder, jobs: Mapping[str, states.SlurmJob] | None, width: int) -> Content:
    """Reads a run's folder, with pictures of at most `width` pixels; `jobs` is as for `detail.describe`.

    Raises UserError if its settings cannot be read.
    """
    experiment, config = run.read_experiment()
    launch, described = states.read_launch(run), detail.describe(run, jobs)
    complete = sample_set.complete(run)
    known = {name: facts for name, facts in complete.items() if _is_known(run, name, facts)}
    shown = [_samples(run, name, facts, width) for name, facts in list(known.items())[:SETS]]
    # The training's own picture stands in where no set has been drawn.
    drawn = {} if shown else {"figures/samples.png": "Samples at the end of the training"}
    return Content(
        label=run.label,
        experiment=experiment,
        config=config,
        detail={**described, "traceback": str(described["traceback"] or "").strip()},
        launch=launch,
        command=shlex.join(["python", Path(argv[0]).name, *argv[1:]]) if (argv := launch.get("argv")) else "",
        # The diff itself stays in launch.json: it may hold what is not to be passed on.
        changed_files=re.findall(r"^diff --git .* b/(.*)$", launch.get("git_diff") or "", re.MULTILINE),
        history=read_jsonl(run.metrics),
        timing=read_jsonl(run.timing),
        quality=read_jsonl(run.quality),
        pictures=_pictures(run, {**drawn, **STRIPS}, width),
        samples=shown,
        left_out=list(known)[SETS:],
        unknown=[name for name in complete if name not in known],
        checkpoints=_checkpoints(run.checkpoints),
    )


def outside(run: RunFolder) -> list[str]:
    """The names of pictures of samples, and in figures/, that a page leaves out: links lead to them, out of the run."""
    found = [*run.figures.glob("[!.]*.png"), *run.samples.glob("[!.]*/[!.]*.png")]
    return sorted(path.relative_to(run.path).as_posix() for path in found if leads_out(run.path, path))


def _is_known(run: RunFolder, name: str, facts: Json) -> bool:
    """Whether the manifest of a set says what a page does."""
    try:
        sample_set.read(run, name)
    except UserError:
        return False
    numbers, hashes = (facts["num_samples"], facts["step"]), facts.get("sha256")
    return all(isinstance(n, int) for n in numbers) and isinstance(hashes, dict) and sample_set.DRAWN in hashes


def _samples(run: RunFolder, name: str, facts: Json, width: int) -> Samples:
    """Describes a set of samples; an evaluation of fewer samples or by an older version is left out."""
    folder = run.samples / name
    results = _read_object(folder / "metrics.json")
    measured = results.get("protocol", {})
    version = run.read_experiment()[1].data.metrics_version
    # Numbers of other samples, or by metrics of another version, would stand beside the wrong picture.
    if (measured.get("version"), measured.get("sha256", {}).get("samples")) != (
        version,
        facts["sha256"][sample_set.DRAWN],
    ):
        results = {}
    # So would its figures; while they are missing, those of the evaluation before it are still there.
    drawn = results and not Evaluation(sample_set.read(run, name), measured).undrawn.exists()
    files = sorted(path.name for path in folder.glob("[!.]*.png") if path.name != "grid.png") if drawn else []
    texts = {file: file.removesuffix(".png").replace("-", " ").capitalize() for file in files}
    pictures = {f"samples/{name}/{file}": text for file, text in {"grid.png": "Samples", **texts}.items()}
    return Samples(
        name=name,
        facts=facts,
        pictures=_pictures(run, pictures, width),
        metrics=report.metric_rows(results) if results else {},
        tables={entry["title"]: report.columns(entry) for entry in results.get("tables", {}).values()},
        legend=f"Measured on {report.judged(results)}. {report.legend(results)}" if results else "",
        num_judged=report.num_judged(results) if results else 0,
    )


def _pictures(run: RunFolder, texts: Mapping[str, str], width: int) -> list[Picture]:
    found = [picture(run.path, name, text, width) for name, text in texts.items()]
    return [entry for entry in found if entry is not None]


def _checkpoints(folder: Path) -> list[Json]:
    """What the manifests of the checkpoints say; their files are not verified, which would take long."""
    found = [
        _read_object(folder / checkpoints.folder_name(step) / checkpoints.MANIFEST)
        for step in checkpoints.steps(folder)
    ]
    # The run may be running: of a checkpoint that it deletes meanwhile there is only {}.
    return [manifest for manifest in found if "files" in manifest]


def _read_object(path: Path) -> Json:
    """The object in a file of JSON, {} where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
