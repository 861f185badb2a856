"""The command line: `python launch.py COMMAND --help`. Puts jobs and places together; imports no torch on the way."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, Positional, arg, subcommand

from diffusion.settings import SAMPLER_STEPS, SamplerSettings, SettingsError
from jobs import drill, experiments, ownership, provenance, run_folder, samples
from jobs.experiments import EXPERIMENTS, MAY_CHANGE, ExperimentConfig
from jobs.job import MergeJob, SampleJob, TrainJob
from jobs.run_folder import RunFolder
from jobs.samples import Weights
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
class Resume:
    """Continues a run, also a failed one, on other GPUs if asked."""

    run: Run
    train: TrainChanges = field(default_factory=TrainChanges)
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        experiment, config = run.read_experiment()
        changes = _given(self.train)
        if changes.get("steps", config.train.steps) < config.train.steps:
            raise ValueError(f"--train.steps may only be raised from {config.train.steps}; got {changes['steps']}")
        return _train(run, experiment, replace(config, train=replace(config.train, **changes)), self.where)


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
            merge = MergeJob(asked)
            what = place.describe_array(elements, merge) if isinstance(place, OnSlurm) else place.describe(job)
            return _show({**asdict(asked.settings), "num_samples": asked.num_samples}, what)
        for job_id, state in queue.active(asked.job_ids()).items():
            raise ValueError(f"{where} is being drawn already: job {job_id} is {state}")
        asked.check_disk()
        replace(place, processes=1).check(job)  # the elements of an array are one task each
        print(f"{asked.num_samples:,} samples need {asked.needed_bytes() / 1e6:,.1f} MB of disk.")
        asked.write_manifest()
        if isinstance(place, OnSlurm):
            place.run_array(elements, MergeJob(asked), self.where.wait)
            return 0 if not self.where.wait or asked.is_complete() else 1
        code = place.run(job)
        if code == 0:
            print(f"{asked.num_samples:,} samples are in {where}: samples.npz, grid.png.")
        return code


@dataclass(frozen=True, kw_only=True)
class DrillCommand:
    """Trains twice, once killed again and again, and shows that the results are equal byte for byte."""

    kills: int = 4
    """How often the second training is killed: by SIGKILL, SIGTERM, SIGUSR2 and Ctrl-C in turn."""
    steps: int = 400
    """Steps of the training, a small 1D model."""
    seed: int = 0
    """Decides the moments of the kills."""
    where: Annotated[Where, arg(name="")] = field(default_factory=Where)

    def __call__(self) -> int:
        if not 0 < self.kills < self.steps:
            raise ValueError(
                f"--kills must lie between 1 and --steps - 1; got --kills {self.kills} --steps {self.steps}"
            )
        device = self.where.resolve_device(Here(self.where.processes))
        folder = self.where.runs_dir.absolute() / "drill" / run_folder.new_name(self.where.runs_dir / "drill")
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "train", "1d", "--runs-dir", folder, "--device", device]
        command += ["--gpus", self.where.processes, "--train.steps", self.steps, "--train.log-every", 1]
        command += [
            "--train.batch-size",
            64 * self.where.processes,
            "--train.checkpoint-every",
            max(1, self.steps // 8),
        ]
        processes = f"{self.where.processes} process{'es' if self.where.processes > 1 else ''}"
        print(f"Drill with {processes} on {device}; everything is kept in {folder}")
        start = drill.starter(list(map(str, command)), folder / "log.txt")
        equal = drill.Drill(folder / "1d", start, self.steps, self.kills, self.seed).run(print)
        print("Equal byte for byte: checkpoints and metrics." if equal else "NOT EQUAL: please report this.")
        return 0 if equal else 1


def _train(run: RunFolder, experiment: str, config: ExperimentConfig, where: Where) -> int:
    """Creates or continues the run, here or on Slurm; returns the exit code."""
    if config.train.batch_size % where.processes:
        raise ValueError(
            "train.batch-size must be a multiple of the number of GPUs; "
            f"got train.batch-size={config.train.batch_size} on {where.processes} GPUs"
        )
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
    _create(run, experiment, config, {"processes": job.processes, "device": job.device})
    with ownership.locked(run.path) as descriptor:
        if descriptor is None:
            raise ValueError(f"{run} is running already (process {run.read_status().get('pid')} on this machine)")
        run.write_experiment(experiment, config)
        run.clear_failure()
        if isinstance(place, Here):
            return place.run(job, keep_open=descriptor)
    place.run(job, where.wait)
    return 0 if not where.wait or run.read_status().get("state") == "finished" else 1


def _create(run: RunFolder, experiment: str, config: ExperimentConfig, resources: dict[str, Any]) -> None:
    """Makes the run's folder unless it is there; raises ValueError if it cannot be made."""
    if run.exists():
        return
    try:
        run.create(experiment, config, provenance.describe(resources=resources), provenance.save_code)
    except OSError as error:
        raise ValueError(f"{run} must be a folder that can be written: {error.strerror}") from error


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
        Annotated[DrillCommand, subcommand("drill")],
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


if __name__ == "__main__":
    sys.exit(main())
