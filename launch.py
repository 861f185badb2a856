"""The command line: `python launch.py COMMAND --help`. Puts jobs and places together; imports no torch on the way."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, Positional, arg, subcommand

from diffusion.settings import SAMPLER_STEPS, SamplerSettings, SettingsError
from jobs import checkpoints, drill, experiments, ownership, provenance, run_folder
from jobs.experiments import EXPERIMENTS, MAY_CHANGE, ExperimentConfig
from jobs.job import Job, SampleJob, TrainJob
from jobs.run_folder import RunFolder
from jobs.samples import SampleSet, SampleSettings, Weights
from jobs.settings import check_seed
from slurm import local


def optional(metavar: str, default: str) -> Any:
    """How the help shows an option that is None unless given: the default is what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


Run = Annotated[
    Positional[str],
    arg(metavar="RUN", help="A run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run."),
]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the job runs."""

    gpus: Annotated[int | None, optional("INT", "one")] = None
    """Number of GPUs; with --device cpu, number of processes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is a GPU where there is one."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise SettingsError(f"--gpus must be at least 1; got {self.gpus}")

    @property
    def processes(self) -> int:
        return self.gpus or 1


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
        given = {f.name: getattr(self.train, f.name) for f in fields(self.train)}
        changes = {name: value for name, value in given.items() if value is not None}
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
        samples = self._sample_set(run)
        samples.check_existing()
        if samples.is_complete():
            print(f"{samples.num_samples:,} samples are in {run}/samples/{samples.name} already.")
            return 0
        device = _local_device(self.where)
        samples.write_manifest()
        code = _run_here(SampleJob(samples, self.where.processes, device), self.where.processes)
        if code == 0:
            print(f"{samples.num_samples:,} samples are in {run}/samples/{samples.name}: samples.npz, grid.png.")
        return code

    def _sample_set(self, run: RunFolder) -> SampleSet:
        experiment, config = run.read_experiment()
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1; got {self.num_samples}")
        check_seed("--seed", self.seed)
        timesteps = config.diffusion.timesteps
        steps = self.steps if self.steps is not None else SAMPLER_STEPS[self.sampler] or timesteps
        sampler = SamplerSettings(sampler=self.sampler, steps=steps, eta=self.eta)
        sampler.check(timesteps)
        step, manifest = checkpoints.choose(run.checkpoints, self.checkpoint, print)
        settings = SampleSettings(
            step=step,
            weights=self.weights,
            weights_sha256=manifest["files"][f"{self.weights}.safetensors"]["sha256"],
            sampler=sampler,
            seed=self.seed,
            precision=config.train.precision,
            sub_batch_size=EXPERIMENTS[experiment].sub_batch_size,
            shard_size=EXPERIMENTS[experiment].shard_size,
        )
        name = self.name or settings.label
        return SampleSet(run.path, run_folder.check_name(name, run_folder.SAMPLES_NAME), settings, self.num_samples)


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
        device = _local_device(self.where)
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
    """Creates or continues the run, here, and waits for its end."""
    processes = where.processes
    if config.train.batch_size % processes:
        raise ValueError(
            f"train.batch-size must be a multiple of the number of GPUs; "
            f"got train.batch-size={config.train.batch_size} on {processes} GPUs"
        )
    if _is_finished(run, config):
        print(
            f"{run} is finished: {config.train.steps:,} steps are done. `resume {run} --train.steps N` trains longer."
        )
        return 0
    device = _local_device(where)
    config.prepare(print)
    resources = {"processes": processes, "device": device}
    if not run.exists():
        try:
            run.create(experiment, config, provenance.describe(resources=resources), provenance.save_code)
        except OSError as error:
            raise ValueError(f"{run} must be a folder that can be written: {error.strerror}") from error
    with ownership.locked(run.path) as descriptor:
        if descriptor is None:
            raise ValueError(f"{run} is running already (process {run.read_status().get('pid')} on this machine)")
        run.write_experiment(experiment, config)
        run.clear_failure()
        return _run_here(TrainJob(run.path, processes, device), processes, [descriptor])


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


def _run_here(job: Job, processes: int, keep_open: Sequence[int] = ()) -> int:
    """Runs a job on this machine: one process in this one, so that debuggers work, several below it."""
    if processes == 1:
        return job()
    outcome = local.run(job, processes, keep_open=keep_open)
    if outcome.signal is not None:
        job.failed(outcome.failed_rank, f"process {outcome.failed_rank} was ended by {outcome.signal}")
    return outcome.exit_code


def _local_device(where: Where) -> Literal["cuda", "cpu"]:
    from jobs.world import resolve_device  # imports torch, which this machine is about to use anyway

    return resolve_device(where.device, where.gpus)


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
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
