"""`audit` computes steps of a run again and compares them with its records, here or as an array on Slurm."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import arg

from commands.arguments import AMONG_OPTIONS, Run, optional
from commands.where import Data, Start, show
from diffusion.errors import UserError
from jobs.runtime.job import submitted
from jobs.storage import run_folder
from jobs.storage.provenance import code_folder
from slurm.place import OnSlurm


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Computes a run, or steps of it, again, and says whether it gets the same bytes; the run may be running.

    On Slurm an array computes from each kept checkpoint to the next, --gpus of them at once.
    """

    run: Run
    start: Annotated[int, arg(name="from", metavar="STEP")] = 0
    """The step to begin after: that of a kept checkpoint, or 0."""
    stop: Annotated[int | None, arg(name="to"), optional("STEP", "the last checkpoint")] = None
    """The last step: one whose checkpoint has been made; it may be deleted."""
    data: Data = field(default_factory=Data)
    where: Annotated[Start, AMONG_OPTIONS] = field(default_factory=Start)

    def __call__(self) -> int:
        from jobs.audit import plan, report  # here, because other commands need none of it, nor does --help
        from jobs.audit.job import AuditJob, ReportJob

        run = run_folder.find(self.run, self.where.runs_dir)
        _, config = run.read_experiment()
        config = config.moved(self.data.root).absolute()
        folder = self.where.runs_dir.absolute() / "audit" / run_folder.new_name(self.where.runs_dir / "audit")
        audit = plan.plan(run, config, self.start, self.stop, folder, print)
        place = self.where.place(run)
        is_array = isinstance(place, OnSlurm)
        if not is_array and self.where.processes > audit.most_processes:
            raise UserError(
                f"--gpus must not exceed the {audit.most_processes} shards of the run's gradient, or bytes would "
                f"differ; got {self.where.processes}"
            )
        device = self.where.resolve_device(place, config.train.precision)
        jobs = [AuditJob(audit, part, 1 if is_array else self.where.processes, device) for part in audit.stretches]
        after = ReportJob(audit)
        if isinstance(place, OnSlurm):
            # Not in the run's folder, which an audit leaves as it is. An element has one task: bytes are the same.
            place = replace(place, processes=1, folder=folder / "slurm", code=folder / "code")
        if self.where.dry_run:
            stretches = [f"{part.start} to {part.stop}" for part in audit.stretches]
            what = place.describe(jobs[0])
            if isinstance(place, OnSlurm):
                what = place.describe_array(jobs, self.where.processes, after)
            return show({"run": str(run), "steps": stretches}, what)
        if isinstance(place, OnSlurm):
            place.check_array(jobs, after)
        config.data.prepare(print)
        if code_folder(run.path).name != "code":
            print(f"{run} began with other code than this.")
        try:
            audit.begin(min(self.where.processes, len(jobs)) if is_array else 1)
        except FileExistsError:  # another command was started in the same second
            return self()
        if isinstance(place, OnSlurm):
            self.where.copy_code(place)
            place.run_array(jobs, submitted, self.where.processes, after)
            if not self.where.wait:
                print(f"It writes what it finds into {run_folder.as_typed(folder)}/report.txt.")
                return 0
            place.wait(audit.job_ids, lambda: None)
        else:
            with ExitStack() as stopped:
                # Unless `pop_all` is reached: checkpoints of an audit without an end would only fill the disk.
                stopped.callback(audit.stop)
                for job in jobs:
                    if (code := place.run(job)) != 0:
                        return code
                stopped.pop_all()
        equal, text = report.conclude(audit)
        print(text)
        return 0 if equal else 1
