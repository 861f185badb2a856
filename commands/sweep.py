"""The command `sweep`: trains the points of a grid, each a run of its own."""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Union

import tyro
from tyro.conf import arg

from commands.arguments import AMONG_OPTIONS, CHOICES
from commands.train import as_begun, check_same_settings, choice, create, is_finished, run_training, with_notify
from commands.where import Launch, show
from diffusion.errors import UserError
from jobs import notify
from jobs.experiments import experiment_json, grid
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import faults, provenance, run_folder
from jobs.storage.run_folder import RunFolder, State
from jobs.train.job import TrainJob, submit_runs
from jobs.watch import states
from slurm import queue
from slurm.place import Here, OnSlurm


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trains a grid of settings, each point a run of its own; run again, trains what is not finished."""

    chosen: Annotated[Any, arg(name="", constructor=Union[tuple(map(choice, EXPERIMENTS))])]  # noqa: UP007
    """Which experiment, and the settings that all points share; `train EXPERIMENT --help` shows them."""
    name: Annotated[str, arg(metavar="NAME")]
    """Name of the sweep; its runs are called NAME-000, NAME-001, ..."""
    grid: Annotated[tuple[str, ...], arg(metavar="SETTING=VALUE,VALUE,...")]
    """Settings and their values, such as train.lr=1e-3,2e-3 train.seed=0,1: all combinations."""
    where: Annotated[Launch, AMONG_OPTIONS] = field(default_factory=Launch)

    def __call__(self) -> int:
        experiment, base = self.chosen.experiment, self.chosen.config
        points = grid.points(self.grid, experiment_json.flags(base))
        if not any(name.startswith("data.") for name in points[0]):
            base = base.absolute()  # once for all points: own images are read for it
        folder = self.where.runs_dir / experiment
        place = self.where.place(RunFolder(folder / run_folder.check_name(self.name)))
        device, retries = self.where.resolve_device(place), self.where.retries_at(place)
        jobs, busy = [], 0
        same: dict[str, str] = {}
        for i, point in enumerate(points):
            # By tyro and not by hand: so a point takes, and refuses, what the flags do.
            words = grid.arguments(point)
            typed = " ".join(words)
            # With the name of a command, because tyro says that its --help tells more.
            program = f"launch.py train {experiment}"
            config = tyro.cli(type(base), default=base, args=words, prog=program, registry=CHOICES).absolute()
            # Compared as settings: 1e-3 and 0.001 are one value.
            if (settings := experiment_json.write(experiment, config)) in same:
                raise UserError(f"--grid must train no run twice; {same[settings]} and {typed} are the same settings")
            same[settings] = typed
            config = with_notify(config, self.where)
            run = RunFolder(folder / grid.run_name(self.name, i))
            config = as_begun(run, config, self.where)
            if run.exists():
                check_same_settings(run, experiment, config)
            if is_finished(run, config):
                continue
            if queue.active(run.read_launch().get("job_ids", [])):
                busy += 1
            else:
                jobs.append((TrainJob(run.path, self.where.processes, device, retries), config, point))
        if not jobs:
            print(f"All runs of {self.name} are finished or on their way: `status {self.name}`.")
            return 0
        if isinstance(place, OnSlurm) and place.profile.max_jobs is not None:
            if (most := max(0, place.profile.max_jobs - busy)) < len(jobs):
                print(f"{most} of {len(jobs)} runs are submitted, as max_jobs says; later, this command submits more.")
            jobs = jobs[:most]
            if not jobs:
                return 0
        if self.where.dry_run:
            for job, _, point in jobs:
                print(f"{job.run.name}: {' '.join(grid.arguments(point))}")
            what = place.describe(jobs[0][0])
            if isinstance(place, OnSlurm):
                what = place.describe_array([job for job, _, _ in jobs])
            return show({"experiment": experiment, **asdict(base)}, what)
        if isinstance(place, OnSlurm):
            place.check_array([job for job, _, _ in jobs])
        for data in dict.fromkeys(config.data for _, config, _ in jobs):
            data.prepare(print)
        for job, config, point in jobs:
            resources = {"processes": job.processes, "device": device}
            facts = {"resources": resources, "sweep": self.name, "point": point}
            if not RunFolder(job.run).exists():
                create(RunFolder(job.run), experiment, config, facts)
        if isinstance(place, Here):
            codes = []
            for job, config, _ in jobs:
                codes.append(run_training(RunFolder(job.run), experiment, config, self.where, is_new=False))
                if codes[-1] == 130:  # whoever interrupts one run means the sweep
                    break
            return max(codes)
        # An array has one script, which starts in one copy of the code: that of its first run.
        place = replace(place, code=provenance.code_folder(jobs[0][0].run))
        self.where.copy_code(place)
        for job, _, _ in jobs:
            RunFolder(job.run).clear_failure()
            faults.forgive(RunFolder(job.run))
            notify.rearm(RunFolder(job.run))
        place.run_array([job for job, _, _ in jobs], lambda part, submit: submit_runs([j.run for j in part], submit))
        runs = [RunFolder(job.run) for job, _, _ in jobs]
        if self.where.wait:

            def lives() -> bool | None:
                """What the first run says that has not ended: until that one has, the others do not matter."""
                return next((sign for sign in map(states.lives, runs) if sign is not False), False)

            place.wait(lambda: states.newest_jobs(runs), lives)
        finished = all(run.state() is State.FINISHED for run in runs)
        return 0 if not self.where.wait or finished else 1
