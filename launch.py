"""The command line: `python launch.py COMMAND --help`. Puts jobs and places together; imports no torch on the way."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, Positional, arg, subcommand

from diffusion.settings import SAMPLER_STEPS, MnistSettings, SamplerSettings, SettingsError
from jobs import detail, doctor, drill, experiments, logs, overview, ownership, provenance, run_folder, samples, sweep
from jobs.cancel import cancel
from jobs.doctor_job import DoctorJob
from jobs.experiments import EXPERIMENTS, MAY_CHANGE, ExperimentConfig
from jobs.job import MergeJob, SampleJob, TrainJob, submit_runs
from jobs.run_folder import RunFolder
from jobs.samples import Weights
from slurm import doctor as slurm_doctor
from slurm import queue
from slurm.place import Here, OnSlurm
from slurm.profile import load as load_profile


def optional(metavar: str, default: str) -> Any:
    """How the help shows an option that is None unless given: the default is what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


Run = Annotated[
    Positional[str],
    arg(metavar="RUN", help="A run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run."),
]


@dataclass(frozen=True, kw_only=True)
class SlurmChanges:
    """What to ask Slurm for; replaces what the profile says."""

    partition: Annotated[str | None, optional("NAME", "the profile's")] = None
    """Partition."""
    account: Annotated[str | None, optional("NAME", "the profile's")] = None
    """Account to charge."""
    qos: Annotated[str | None, optional("NAME", "the profile's")] = None
    """Quality of service."""
    constraint: Annotated[str | None, optional("FEATURES", "the profile's")] = None
    """Node features, such as a100|h100."""
    gpus_per_node: Annotated[int | None, optional("INT", "the profile's, or 8")] = None
    """GPUs of one node; a job with more takes several whole nodes."""
    cpus_per_gpu: Annotated[int | None, optional("INT", "the profile's, or 4")] = None
    """CPU cores for each GPU."""
    mem_gb: Annotated[int | None, optional("INT", "the profile's")] = None
    """Memory on each node."""
    time_min: Annotated[int | None, optional("INT", "the profile's, or 60")] = None
    """Time limit. A run that needs longer is queued again as often as it takes."""
    signal_delay_s: Annotated[int | None, optional("INT", "the profile's, or 120")] = None
    """How long before the limit the job is told to save."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the job runs."""

    cluster: Literal["auto", "local", "slurm"] = "auto"
    """auto is Slurm where it answers, but not from within a job."""
    gpus: Annotated[int | None, optional("INT", "one")] = None
    """Number of GPUs in all; with --device cpu, number of processes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is a GPU where there is one."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    profile: Annotated[str | None, optional("NAME", "none")] = None
    """Slurm settings of a site: a TOML file, or the name of one in slurm/profiles."""
    slurm: SlurmChanges = field(default_factory=SlurmChanges)
    dry_run: bool = False
    """Show the settings and, for Slurm, the script; touch nothing."""
    wait: bool = False
    """Stay until the Slurm job has ended."""

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise SettingsError(f"--gpus must be at least 1; got {self.gpus}")

    @property
    def processes(self) -> int:
        return self.gpus or 1

    def place(self, run: RunFolder) -> Here | OnSlurm:
        """Where a job of the run is to run; raises ValueError where that cannot be."""
        if not self.on_slurm():
            return Here(self.processes)
        site = load_profile(self.profile, _given(self.slurm))
        name = f"{run.path.parent.name}/{run.path.name}"
        return OnSlurm(self.processes, site, self.device != "cpu", name, run.path / "slurm", run.code)

    def on_slurm(self) -> bool:
        """Whether the job goes to Slurm; raises ValueError if it should and cannot."""
        if self.cluster == "slurm" and not queue.has_slurm():
            raise ValueError(
                "--cluster slurm needs sbatch and a controller that answers `scontrol ping`; there is none here"
            )
        return self.cluster == "slurm" or (self.cluster == "auto" and queue.is_available())

    def resolve_device(self, place: Here | OnSlurm) -> Literal["cuda", "cpu"]:
        """The kind of device; raises ValueError where GPUs are asked for that are not there."""
        if isinstance(place, OnSlurm):
            return "cpu" if self.device == "cpu" else "cuda"
        from jobs.world import resolve_device  # imports torch, which this machine is about to use anyway

        return resolve_device(self.device, self.gpus)


def _given(changes: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None."""
    return {f.name: getattr(changes, f.name) for f in fields(changes) if getattr(changes, f.name) is not None}


def _choice(name: str) -> Any:
    """An experiment of the table as a subcommand: its settings, and its name in `experiment`."""
    entry = EXPERIMENTS[name]
    settings = [("config", Annotated[type(entry.preset), arg(name="")])]
    chosen = make_dataclass("Chosen", settings, frozen=True, namespace={"experiment": name})
    return Annotated[chosen, subcommand(name, default=chosen(entry.preset), description=entry.help)]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model; with the name of a run that exists, continues it."""

    chosen: Annotated[Any, arg(name="", constructor=Union[tuple(map(_choice, EXPERIMENTS))])]  # noqa: UP007
    """Which experiment."""
    name: Annotated[str | None, optional("NAME", "date and time")] = None
    """Name of the run."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        experiment, config = self.chosen.experiment, self.chosen.config.absolute()
        folder = self.where.runs_dir / experiment
        name = run_folder.check_name(self.name) if self.name is not None else run_folder.new_name(folder)
        run = RunFolder(folder / name)
        if run.exists():
            _check_same_settings(run, experiment, config)
            if run.read_status().get("state") == "failed":
                raise ValueError(f"{run} has failed; continue it with: python launch.py resume {run}")
        elif run.path.exists():
            raise ValueError(f"{run} exists and is no run folder; choose another --name")
        return _train(run, experiment, config, self.where)


@dataclass(frozen=True, kw_only=True)
class TrainChanges:
    """Settings of a run that may change when it is continued."""

    steps: Annotated[int | None, optional("INT", "as it was")] = None
    """Train longer: a larger number of steps."""
    micro_batch_size: Annotated[int | None, optional("INT", "as it was")] = None
    """Examples that one GPU takes at a time."""
    log_every: Annotated[int | None, optional("INT", "as it was")] = None
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Annotated[int | None, optional("INT", "as it was")] = None
    """Steps between checkpoints."""
    checkpoint_minutes: Annotated[float | None, optional("FLOAT", "as it was")] = None
    """Minutes after which a checkpoint is written in any case."""
    keep_checkpoints: Annotated[int | None, optional("INT", "as it was")] = None
    """Number of newest checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class TrackingChanges:
    """Tracking, which may change when a run is continued."""

    mode: Annotated[Literal["auto", "online", "offline", "disabled"] | None, optional("MODE", "as it was")] = None
    """auto, online, offline or disabled, as for train."""
    samples_every: Annotated[int | None, optional("INT", "as it was")] = None
    """Steps between pictures of samples."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continues a run, also a failed one, on other GPUs if asked."""

    run: Run
    train: TrainChanges = field(default_factory=TrainChanges)
    tracking: TrackingChanges = field(default_factory=TrackingChanges)
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        experiment, config = run.read_experiment()
        changes = _given(self.train)
        if changes.get("steps", config.train.steps) < config.train.steps:
            raise ValueError(f"--train.steps may only be raised from {config.train.steps}; got {changes['steps']}")
        train, tracking = replace(config.train, **changes), replace(config.tracking, **_given(self.tracking))
        return _train(run, experiment, replace(config, train=train, tracking=tracking), self.where)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws samples of a trained model; run again, draws what is missing."""

    run: Run
    num_samples: int = 64
    """Samples in the set. A larger number extends a set that exists."""
    seed: int = 0
    """Sample i depends on the seed and i, not on the number of samples or processes."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddim"
    """ddpm (ancestral), ddim, or dpm++ (DPM-Solver++ 2M)."""
    steps: Annotated[int | None, optional("INT", "50 for ddim, 25 for dpm++, all timesteps for ddpm")] = None
    """Network evaluations for each sample."""
    eta: float = 0.0
    """Noise of ddim: 0 is deterministic, 1 as random as ddpm."""
    weights: Weights = "ema"
    """The moving average of the weights, or the weights themselves."""
    checkpoint: Annotated[int | None, optional("STEP", "the newest")] = None
    """Step of the checkpoint."""
    name: Annotated[str | None, optional("NAME", "what was used, like step-00002000-dpm++-25-seed0")] = None
    """Name of the set."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        _, config = run.read_experiment()
        steps = self.steps if self.steps is not None else SAMPLER_STEPS[self.sampler] or config.diffusion.timesteps
        asked = samples.plan(
            run,
            num_samples=self.num_samples,
            seed=self.seed,
            sampler=SamplerSettings(sampler=self.sampler, steps=steps, eta=self.eta),
            weights=self.weights,
            checkpoint=self.checkpoint,
            name=self.name,
            say=print,
        )
        where = f"{run}/samples/{asked.name}"
        if asked.is_complete():
            print(f"{asked.num_samples:,} samples are in {where} already.")
            return 0
        place = self.where.place(run)
        missing = tuple(asked.missing())
        job = SampleJob(asked, missing, self.where.processes, self.where.resolve_device(place), merge=True)
        # On Slurm an array; with more elements than GPUs, so that a slow or late one holds up less.
        count = min(4 * self.where.processes, len(missing))
        elements = [replace(job, shards=missing[i::count], processes=1, merge=False) for i in range(count)]
        if self.where.dry_run:
            what = place.describe(job)
            if isinstance(place, OnSlurm):
                what = replace(place, processes=1).describe_array(elements, place.processes, MergeJob(asked))
            return _show({**asdict(asked.settings), "num_samples": asked.num_samples}, what)
        for job_id, state in queue.active(asked.job_ids()).items():
            raise ValueError(f"{where} is being drawn already: job {job_id} is {state}")
        asked.check_disk()
        replace(place, processes=1).check(job)  # the elements of an array are one task each
        print(f"{asked.num_samples:,} samples need {asked.needed_bytes() / 1e6:,.1f} MB of disk.")
        asked.write_manifest()
        if isinstance(place, OnSlurm):
            single, merge = replace(place, processes=1), MergeJob(asked)
            job_ids = single.run_array(elements, lambda jobs, submit: jobs[0].submitted(submit), place.processes, merge)
            if self.where.wait:
                place.wait(job_ids)
            return 0 if not self.where.wait or asked.is_complete() else 1
        code = place.run(job)
        if code == 0:
            print(f"{asked.num_samples:,} samples are in {where}: samples.npz, grid.png.")
        return code


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Trains twice, once stopped again and again, and shows that the results are equal byte for byte."""

    kills: int = 4
    """How often the second training is stopped: here by SIGKILL, SIGTERM, SIGUSR2 and Ctrl-C in turn; on Slurm by the
    signal that precedes the time limit or a preemption, and by a requeue."""
    steps: int = 400
    """Steps of the training, a small 1D model."""
    seed: int = 0
    """Decides the moments."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        if not 0 < self.kills < self.steps:
            raise ValueError(f"--kills must lie between 1 and --steps - 1; got {self.kills} of {self.steps} steps")
        folder = self.where.runs_dir.absolute() / "drill" / run_folder.new_name(self.where.runs_dir / "drill")
        place = self.where.place(RunFolder(folder))
        device = self.where.resolve_device(place)
        command = self._command(folder, place, device)
        if self.where.dry_run:
            return _show({"steps": self.steps, "kills": self.kills}, " ".join(map(str, command)))
        folder.mkdir(parents=True)
        print(f"Drill with {place.processes} process(es) on {device}; everything is kept in {folder}", flush=True)
        by_slurm = {"USR2": drill.on_its_job(queue.warn), "scontrol requeue": drill.on_its_job(queue.requeue)}
        disturbances = by_slurm if isinstance(place, OnSlurm) else drill.SIGNALS
        start = drill.starter(list(map(str, command)), folder / "log.txt")
        equal = drill.Drill(folder / "1d", start, disturbances, self.steps, self.kills, self.seed).run(print)
        print("Equal byte for byte: checkpoints and metrics." if equal else "NOT EQUAL: please report this.")
        return 0 if equal else 1

    def _command(self, folder: Path, place: Here | OnSlurm, device: str) -> list[object]:
        """The training, without its name."""
        cluster = ["--cluster", "slurm", "--wait"] if isinstance(place, OnSlurm) else ["--cluster", "local"]
        profile = ["--profile", self.where.profile] if self.where.profile is not None else []
        changes = [(f"--slurm.{name.replace('_', '-')}", value) for name, value in _given(self.where.slurm).items()]
        return [
            *(sys.executable, __file__, "train", "1d", "--runs-dir", folder, "--device", device, *cluster, *profile),
            *(word for change in changes for word in change),
            *("--gpus", place.processes, "--train.batch-size", 64 * place.processes, "--train.steps", self.steps),
            *(
                "--train.log-every",
                1,
                "--train.checkpoint-every",
                max(1, self.steps // 8),
                "--tracking.mode",
                "disabled",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Status:
    """Shows all runs, one of them in detail, or a sweep's runs by their loss."""

    run: Annotated[
        Positional[str | None], arg(metavar="[RUN]", help="A run or a sweep; without it all runs are shown.")
    ] = None
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    json: bool = False
    """Print it for scripts."""

    def __call__(self) -> int:
        width = shutil.get_terminal_size().columns
        named = self.run is not None and not Path(self.run).is_dir()  # an existing folder is a run
        points = sweep.runs_of(str(self.run), self.runs_dir) if named else []
        if points:
            entries = sweep.by_loss(points, _ask_slurm(overview.newest_jobs(points)))
            print(json.dumps(entries, indent=2) if self.json else sweep.render(entries, width))
            return 0
        if self.run is not None:
            run = run_folder.find(self.run, self.runs_dir)
            shown = detail.describe(run, _ask_slurm(detail.all_jobs(run)))
            print(json.dumps(shown, indent=2) if self.json else detail.render(shown, width))
            return 0
        runs = overview.runs(self.runs_dir)
        jobs = _ask_slurm(overview.newest_jobs(runs))
        found = overview.by_last_update(overview.summarize(run, jobs) for run in runs)
        if self.json:
            print(json.dumps([asdict(entry) for entry in found], indent=2))
        else:
            print(overview.render(found, width) if found else f"There are no runs in {self.runs_dir}.")
        return 0


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Shows what a run has printed."""

    run: Run
    follow: bool = False
    """Go on until the run has ended."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.runs_dir)
        if not self.follow:
            _say_aside(logs.title(run))
            print(logs.read(run), end="")
            return 0

        def is_alive() -> bool:
            return overview.is_alive(run, _ask_slurm(overview.newest_jobs([run])))

        for text in logs.follow(run, is_alive, _say_aside):
            print(text, end="", flush=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Ends a run for good, with a last checkpoint."""

    run: Run
    runs_dir: Path = Path("runs")
    """Folder of all runs."""

    def __call__(self) -> int:
        cancel(run_folder.find(self.run, self.runs_dir), queue.active, queue.cancel, print)
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examines this machine or cluster before a job is lost to it: what is wrong, why it matters, what helps."""

    submit: bool = False
    """Submit a short job with the --gpus asked for, which tries out GPUs, network and the folder of runs."""
    json: bool = False
    """Print it for scripts."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        findings = []
        for finding in self._examine():
            findings.append(finding)
            if not self.json:
                _show_finding(*finding)
        if self.json:
            print(json.dumps([finding._asdict() for finding in findings], indent=2))
        return 1 if any(finding.level == "problem" for finding in findings) else 0

    def _examine(self) -> Iterator[doctor.Finding | slurm_doctor.Finding]:
        on_slurm = self.where.on_slurm()
        if self.submit and not on_slurm:
            raise ValueError("--submit needs a Slurm that answers; there is none here")
        run = RunFolder(self.where.runs_dir / f".doctor-{run_folder.new_name(self.where.runs_dir)}")
        place = self.where.place(run)
        job = DoctorJob(run.path, self.where.processes, "cpu" if self.where.device == "cpu" else "cuda")
        yield from doctor.examine(self.where.runs_dir, Path(MnistSettings().root), is_shared=on_slurm)
        if not isinstance(place, OnSlurm):
            if not queue.has_slurm():
                yield slurm_doctor.unreachable()
            return
        yield from slurm_doctor.examine(place, job)
        if self.submit:
            run.path.mkdir(parents=True)
            provenance.save_code(run.code)
            _submit_and_wait(place, job)
            tried = list(job.findings())
            yield from tried
            if not any(finding.level == "problem" for finding in tried):
                shutil.rmtree(run.path)


def _submit_and_wait(place: OnSlurm, job: DoctorJob) -> None:
    """Runs a job of a few minutes to its end; Ctrl-C cancels it."""
    profile = replace(place.profile, time_min=min(10, place.profile.time_min), signal_delay_s=30)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed for scripts is JSON alone
        job_id = replace(place, profile=profile).run(job)
    try:
        while queue.active([job_id]):
            time.sleep(1)
    except KeyboardInterrupt:
        queue.cancel([job_id])
        raise


def _show_finding(level: str, what: str, why: str, cure: str) -> None:
    width = shutil.get_terminal_size().columns
    for label, text in ((level, what), ("  why", why), ("  cure", cure)):
        if text:
            print(textwrap.fill(f"{label:<9}{text}", width, subsequent_indent=" " * 9, break_on_hyphens=False))
    sys.stdout.flush()


def _ask_slurm(job_ids: list[str]) -> dict[str, queue.JobState] | None:
    """What Slurm says of the jobs; None, and a warning, if it does not answer."""
    try:
        return queue.look(job_ids)
    except RuntimeError as error:
        _say_aside(f"warning: {error}")
        return None


def _say_aside(text: str) -> None:
    """To people, not into the pipe."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trains a grid of settings, each point a run of its own; run again, trains what is not finished."""

    chosen: Annotated[Any, arg(name="", constructor=Union[tuple(map(_choice, EXPERIMENTS))])]  # noqa: UP007
    """Which experiment, and the settings that all points share."""
    name: Annotated[str, arg(metavar="NAME")]
    """Name of the sweep; its runs are called NAME-000, NAME-001, ..."""
    grid: Annotated[tuple[str, ...], arg(metavar="SETTING=VALUE,VALUE,...")]
    """Settings and their values, such as train.lr=1e-3,2e-3 train.seed=0,1: all combinations."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        experiment, base = self.chosen.experiment, self.chosen.config.absolute()
        folder = self.where.runs_dir / experiment
        place = self.where.place(RunFolder(folder / run_folder.check_name(self.name)))
        device = self.where.resolve_device(place)
        jobs = []
        for i, point in enumerate(sweep.points(self.grid)):
            config = tyro.cli(type(base), default=base, args=sweep.arguments(point), prog="--grid")
            _check_batch(config, self.where.processes)
            run = RunFolder(folder / sweep.run_name(self.name, i))
            if run.exists():
                _check_same_settings(run, experiment, config)
            if not _is_finished(run, config) and not queue.active(run.read_launch().get("job_ids", [])):
                jobs.append((TrainJob(run.path, self.where.processes, device), config, point))
        if not jobs:
            print(f"All runs of {self.name} are finished or on their way: `status {self.name}`.")
            return 0
        if self.where.dry_run:
            for job, _, point in jobs:
                print(f"{job.run.name}: {' '.join(sweep.arguments(point))}")
            what = place.describe(jobs[0][0])
            if isinstance(place, OnSlurm):
                what = place.describe_array([job for job, _, _ in jobs])
            return _show({"experiment": experiment, **asdict(base)}, what)
        place.check(jobs[0][0])
        base.prepare(print)
        for job, config, point in jobs:
            resources = {"processes": job.processes, "device": device}
            facts = {"resources": resources, "sweep": self.name, "point": point}
            _create(RunFolder(job.run), experiment, config, facts)
        if isinstance(place, Here):
            codes = []
            for job, config, _ in jobs:
                codes.append(_train(RunFolder(job.run), experiment, config, self.where))
                if codes[-1] == 130:  # whoever interrupts one run means the sweep
                    break
            return max(codes)
        place = replace(place, code=RunFolder(jobs[0][0].run).code)
        job_ids = place.run_array(
            [job for job, _, _ in jobs], lambda part, submit: submit_runs([j.run for j in part], submit)
        )
        if self.where.wait:
            place.wait(job_ids)
        finished = all(RunFolder(job.run).read_status().get("state") == "finished" for job, _, _ in jobs)
        return 0 if not self.where.wait or finished else 1


def _train(run: RunFolder, experiment: str, config: ExperimentConfig, where: Where) -> int:
    """Creates or continues the run, here or on Slurm; returns the exit code."""
    _check_batch(config, where.processes)
    if _is_finished(run, config):
        print(f"{run} is finished: {config.train.steps:,} steps. `resume {run} --train.steps N` trains longer.")
        return 0
    place = where.place(run)
    job = TrainJob(run.path, where.processes, where.resolve_device(place))
    if where.dry_run:
        return _show({"experiment": experiment, **asdict(config)}, place.describe(job))
    _check_idle(run)
    place.check(job)
    config.prepare(print)
    _create(run, experiment, config, {"resources": {"processes": job.processes, "device": job.device}})
    with ownership.locked(run.path) as descriptor:
        if descriptor is None:
            raise ValueError(f"{run} is running already (process {run.read_status().get('pid')} on this machine)")
        run.write_experiment(experiment, config)
        run.clear_failure()
        if isinstance(place, Here):
            return place.run(job, keep_open=descriptor)
    job_id = place.run(job)
    if where.wait:
        place.wait([job_id])
    return 0 if not where.wait or run.read_status().get("state") == "finished" else 1


def _create(run: RunFolder, experiment: str, config: ExperimentConfig, facts: dict[str, Any]) -> None:
    """Makes the run's folder unless it is there; raises ValueError if it cannot be made."""
    if run.exists():
        return
    try:
        run.create(experiment, config, provenance.describe(**facts), provenance.save_code)
    except OSError as error:
        raise ValueError(f"{run} must be a folder that can be written: {error.strerror}") from error


def _check_batch(config: ExperimentConfig, processes: int) -> None:
    """Raises ValueError if the processes' shares of the batch would not be equal."""
    if config.train.batch_size % processes:
        raise ValueError(
            "train.batch-size must be a multiple of the number of GPUs; "
            f"got train.batch-size={config.train.batch_size} on {processes} GPUs"
        )


def _check_idle(run: RunFolder) -> None:
    """Raises ValueError if a Slurm job of the run waits or runs."""
    for job_id, state in queue.active(run.read_launch().get("job_ids", [])).items():
        raise ValueError(f"{run} is on Slurm already: job {job_id} is {state}")


def _show(settings: dict[str, Any], place: str) -> int:
    """Prints what a dry run shows."""
    print(json.dumps(settings, indent=2))
    print(place)
    return 0


def _check_same_settings(run: RunFolder, experiment: str, config: ExperimentConfig) -> None:
    """Raises ValueError naming each setting that differs from the run's and may not."""
    _, old = run.read_experiment()
    changed = [
        f"{flag} is {was}, not {now}"
        for flag, was, now in experiments.differences(old, config)
        if flag not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"{run} exists with other settings: {'; '.join(changed)}. Choose another --name or the same settings"
        )


def _is_finished(run: RunFolder, config: ExperimentConfig) -> bool:
    status = run.read_status() if run.exists() else {}
    return status.get("state") == "finished" and status["step"] >= config.train.steps


def main() -> int:
    """Reads the command line and runs the command; returns the exit code."""
    commands = Union[  # noqa: UP007
        Annotated[Train, subcommand("train")],
        Annotated[Sample, subcommand("sample")],
        Annotated[Resume, subcommand("resume")],
        Annotated[Status, subcommand("status")],
        Annotated[Logs, subcommand("logs")],
        Annotated[Cancel, subcommand("cancel")],
        Annotated[Doctor, subcommand("doctor")],
        Annotated[Sweep, subcommand("sweep")],
        Annotated[Drill, subcommand("drill")],
    ]
    try:
        command: Callable[[], int] = tyro.cli(
            commands,
            prog="launch.py",
            description="Trains and samples diffusion models, here or on a Slurm cluster, and never loses a run.",
            config=(CascadeSubcommandArgs,),
        )
        return command()
    except (SettingsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # Slurm refuses or does not answer
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still wants to flush
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
