"""`train` and `resume`."""

from dataclasses import asdict, dataclass, field, make_dataclass, replace
from typing import Annotated, Any, Literal, Union

from tyro.conf import arg, subcommand

from commands.where import Launch, Run, given, optional, show
from jobs.experiments import record
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.record import MAY_CHANGE
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import ownership, provenance, run_folder
from jobs.storage.records import precision_of
from jobs.storage.run_folder import RunFolder
from jobs.train.job import TrainJob
from slurm import queue
from slurm.place import Here


def choice(name: str) -> Any:
    """An experiment of the table as a subcommand: its settings, and its name in `experiment`."""
    entry = EXPERIMENTS[name]
    settings = [("config", Annotated[type(entry.preset), arg(name="")])]
    chosen = make_dataclass("Chosen", settings, frozen=True, namespace={"experiment": name})
    return Annotated[chosen, subcommand(name, default=chosen(entry.preset), description=entry.help)]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model; with the name of a run that exists, continues it."""

    chosen: Annotated[Any, arg(name="", constructor=Union[tuple(map(choice, EXPERIMENTS))])]  # noqa: UP007
    """Which experiment."""
    name: Annotated[str | None, optional("NAME", "date and time")] = None
    """Name of the run."""
    where: Annotated[Launch, arg(name="")] = field(default_factory=Launch)

    def __call__(self) -> int:
        experiment, config = self.chosen.experiment, self.chosen.config.absolute()
        folder = self.where.runs_dir / experiment
        name = run_folder.check_name(self.name) if self.name is not None else run_folder.new_name(folder)
        run = RunFolder(folder / name)
        if run.exists():
            check_same_settings(run, experiment, config)
            if run.read_status().get("state") == "failed":
                raise ValueError(f"{run} has failed; continue it with: python launch.py resume {run}")
        elif run.path.exists():
            raise ValueError(f"{run} exists and is no run folder; choose another --name")
        return run_training(run, experiment, config, self.where)


@dataclass(frozen=True, kw_only=True)
class TrainChanges:
    """Settings of a run that may change when it is continued."""

    steps: Annotated[int | None, optional("INT", "as it was")] = None
    """Train longer: a larger number of steps."""
    micro_batch_size: Annotated[int | None, optional("INT", "as it was")] = None
    """Examples that one GPU takes at a time."""
    cuda_graph: Annotated[bool | None, optional("{True,False}", "as it was")] = None
    """Whether one GPU gets each step in one launch."""
    precision: Annotated[Literal["bf16", "tf32", "fp32"] | None, optional("{bf16,tf32,fp32}", "as it was")] = None
    """Another precision than the run has had so far: its bytes differ from here on."""
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
    where: Annotated[Launch, arg(name="")] = field(default_factory=Launch)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        experiment, config = run.read_experiment()
        changes = given(self.train)
        if changes.get("steps", config.train.steps) < config.train.steps:
            raise ValueError(f"--train.steps may only be raised from {config.train.steps}; got {changes['steps']}")
        train, tracking = replace(config.train, **changes), replace(config.tracking, **given(self.tracking))
        return run_training(run, experiment, replace(config, train=train, tracking=tracking), self.where)


def run_training(run: RunFolder, experiment: str, config: ExperimentConfig, where: Launch) -> int:
    """Creates or continues the run, here or on Slurm; returns the exit code."""
    check_batch(config, where.processes)
    if is_finished(run, config):
        print(f"{run} is finished: {config.train.steps:,} steps. `resume {run} --train.steps N` trains longer.")
        return 0
    place = where.place(run)
    precision = precision_of(run, config.train.precision, "auto")
    job = TrainJob(run.path, where.processes, where.resolve_device(place, precision))
    if where.dry_run:
        return show({"experiment": experiment, **asdict(config)}, place.describe(job))
    _check_idle(run)
    place.check(job)
    config.prepare(print)
    create(run, experiment, config, {"resources": {"processes": job.processes, "device": job.device}})
    with ownership.locked(run.path) as descriptor:
        if descriptor is None:
            raise ValueError(f"{run} is running already (process {run.read_status().get('pid')} on this machine)")
        run.write_experiment(experiment, config)
        run.clear_failure()
        if isinstance(place, Here):
            return place.run(job, keep_open=descriptor)
    # The lock has guarded what the launcher writes. The job on Slurm takes the run over with a token, on any machine.
    job_id = place.run(job)
    if where.wait:
        place.wait([job_id])
    return 0 if not where.wait or run.read_status().get("state") == "finished" else 1


def create(run: RunFolder, experiment: str, config: ExperimentConfig, facts: dict[str, Any]) -> None:
    """Makes the run's folder unless it is there; raises ValueError if it cannot be made."""
    if run.exists():
        return
    try:
        run.create(experiment, config, provenance.describe(**facts), provenance.save_code)
    except OSError as error:
        raise ValueError(f"{run} must be a folder that can be written: {error.strerror}") from error


def check_batch(config: ExperimentConfig, processes: int) -> None:
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


def check_same_settings(run: RunFolder, experiment: str, config: ExperimentConfig) -> None:
    """Raises ValueError naming each setting that differs from the run's and may not."""
    _, old = run.read_experiment()
    changed = [
        f"{flag} is {was}, not {now}" for flag, was, now in record.differences(old, config) if flag not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"{run} exists with other settings: {'; '.join(changed)}. Choose another --name or the same settings"
        )


def is_finished(run: RunFolder, config: ExperimentConfig) -> bool:
    """Whether nothing is left to do: all steps are made, and their figures are drawn."""
    status = run.read_status() if run.exists() else {}
    is_trained = status.get("state") == "finished" and status["step"] >= config.train.steps
    return is_trained and status.get("missing") is None
