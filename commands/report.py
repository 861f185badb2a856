"""The command `report`: a page about runs, to be passed on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from commands.arguments import RunsDir, optional
from commands.watch import ask_slurm
from diffusion.errors import UserError
from jobs.files import write_atomically
from jobs.storage import run_folder
from jobs.storage.run_folder import RunFolder
from jobs.tracking.identity import short
from jobs.watch import detail, sweep


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes one HTML page about a run, or about several and how they compare; it needs no network."""

    runs: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="RUN [RUN ...]",
            help="Each a run folder, EXPERIMENT/NAME, EXPERIMENT for its last created run, or a sweep.",
            help_behavior_hint="(required)",
        ),
    ]
    out: Annotated[Path | None, optional("FILE", "RUN/report.html, or reports/ for several runs")] = None
    """Where the page goes."""
    runs_dir: RunsDir = Path("runs")

    def __call__(self) -> int:
        if not self.runs:
            raise UserError("report needs a RUN: a run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run")
        runs = [run for name in self.runs for run in sweep.named(name, self.runs_dir)]
        path = self.out or _usual_path(runs)
        if path.is_dir():
            raise UserError(f"--out names the page itself; {path} is a folder")
        if self.out is not None and not path.parent.is_dir():
            raise UserError(f"--out names a file in a folder that is there; {path.parent} is none")
        jobs = ask_slurm([job_id for run in runs for job_id in detail.all_jobs(run)])
        from jobs.report import contents, page  # here, because Bokeh takes a second to import

        content = page.render(runs, jobs)
        if self.out is None:
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, content)
        print(path)
        for run in runs:
            if names := contents.outside(run):
                print(f"Left out of {run.label}, because links lead out of its folder: {', '.join(names)}")
        return 0


def _usual_path(runs: list[RunFolder]) -> Path:
    """Where a page goes unless the user says so; file names end at 255 bytes."""
    if len(runs) == 1:
        return Path(run_folder.as_typed(runs[0].path / "report.html"))
    name = short("-vs-".join(run.label.replace("/", "-") for run in runs))
    return Path("reports") / f"{name}.html"
