"""The commands `train` and `resume`: they make a run or take one up again, and start its job."""

import errno
import platform
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass, replace
from typing import Annotated, Any, Union

from tyro.conf import arg, subcommand

from commands.arguments import AMONG_OPTIONS, Run, optional
from commands.where import Data, Launch, LaunchTraining, Where, changes, given, show
from diffusion.errors import UserError, reason
from jobs import notify
from jobs.experiments import experiment_json
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.experiment_json import MAY_CHANGE
from jobs.experiments.settings import TrackingSettings, TrainSettings, may_change
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import checkpoints, faults, ownership, provenance, run_folder
from jobs.storage.checkpoints import CorruptCheckpoint
from jobs.storage.records import HEARTBEAT_S, now, precision_of
from jobs.storage.run_folder import RunFolder, State
from jobs.train.job import TrainJob
from jobs.watch import states
from slurm import queue
from slurm.place import Here
from slurm.profile import load as load_profile


def choice(name: str) -> Any:
    """An experiment of the table as a subcommand: its settings, and its name in `experiment`."""
    entry = EXPERIMENTS[name]
    settings = [("config", Annotated[type(entry.preset), AMONG_OPTIONS])]
    # The name is no field, because tyro would make a flag of it.
    chosen = make_dataclass("Chosen", settings, frozen=True, namespace={"experiment": name})
    return Annotated[chosen, subcommand(name, default=chosen(entry.preset), description=entry.help)]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model; with the name of a run that exists, continues it."""

    chosen: Annotated[Any, arg(name="", constructor=Union[tuple(map(choice, EXPERIMENTS))])]  # noqa: UP007
    """Which experiment; `train EXPERIMENT --help` shows its settings, too."""
    name: Annotated[str | None, optional("NAME", "date and time")] = None
    """Name of the run."""
    where: Annotated[LaunchTraining, AMONG_OPTIONS] = field(default_factory=LaunchTraining)

    def __call__(self) -> int:
        experiment, config = self.chosen.experiment, self.chosen.config.absolute()
        folder = self.where.runs_dir / experiment
        if self.name is None:
            while True:
                run = RunFolder(folder / run_folder.new_name(folder))
                with suppress(NameTaken):  # by a command that was started in the same second
                    begun = as_begun(run, config, self.where)
                    return run_training(run, experiment, begun, self.where, is_new=True)
        run = RunFolder(folder / run_folder.check_name(self.name))
        config, is_new = as_begun(run, config, self.where), not run.exists()
        if not is_new:
            check_same_settings(run, experiment, config)
            if run.state() is State.FAILED:
                raise UserError(f"{run} has failed; continue it with: python launch.py resume {run}")
        elif run.path.exists():
            raise UserError(f"{run} exists and is no run folder; choose another --name")
        return run_training(run, experiment, config, self.where, is_new=is_new)


def _as_it_was(setting: Field[Any]) -> str | None:
    return "as it was" if may_change(setting, on_purpose=True) else None


TrainChanges, TrackingChanges = changes(TrainSettings, _as_it_was), changes(TrackingSettings, _as_it_was)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continues a run, also a failed one, on other GPUs if asked."""

    run: Run
    train: Annotated[Any, arg(constructor=TrainChanges)] = field(default_factory=TrainChanges)
    """Settings of a run that may change when it is continued."""
    data: Data = field(default_factory=Data)
    tracking: Annotated[Any, arg(constructor=TrackingChanges)] = field(default_factory=TrackingChanges)
    """Where curves and pictures go besides the run's folder."""
    where: Annotated[LaunchTraining, AMONG_OPTIONS] = field(default_factory=LaunchTraining)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        experiment, config = run.read_experiment()
        changed = given(self.train)
        if changed.get("steps", config.train.steps) < config.train.steps:
            raise UserError(f"--train.steps may only be raised from {config.train.steps}; got {changed['steps']}")
        if changed.get("precision") == "auto":
            raise UserError("--train.precision of a run that goes on must be bf16, tf32 or fp32; got auto")
        if changed.get("compile") == "auto":
            raise UserError("--train.compile of a run that goes on must be always or never; got auto")
        if changed.get("grad_shards", 1) is None:
            raise UserError("--train.grad-shards of a run that goes on must be a number; got None")
        train, tracking = replace(config.train, **changed), replace(config.tracking, **given(self.tracking))
        config = replace(config.moved(self.data.root), train=train, tracking=tracking)
        return run_training(run, experiment, config, self.where, is_new=False)


def refuse_flags(command: str, words: Iterable[str]) -> None:
    """Raises UserError for a setting without its section, or one that `resume` does not take.

    tyro would only say that it knows no such flag.
    """
    known = {flag for entry in EXPERIMENTS.values() for flag in experiment_json.flags(entry.preset)}
    sections = (("data", Data), ("train", TrainChanges), ("tracking", TrackingChanges))
    takes = {f"{name}.{option.name.replace('_', '-')}" for name, kind in sections for option in fields(kind)}
    for word in words:
        flag = word.partition("=")[0].replace("_", "-").removeprefix("--")
        meant = [name for name in known if word.startswith("--") and flag in (name, name.partition(".")[2])]
        if len(meant) == 1 and command == "resume" and meant[0] not in takes:
            raise UserError(
                f"--{meant[0]} is fixed when a run begins, because its result depends on it: "
                f"`python launch.py train EXPERIMENT --{meant[0]} ...` trains a new run with another value; "
                "`python launch.py resume --help` lists what may change"
            )
        if len(meant) == 1 and meant[0] != flag:
            raise UserError(f"there is no --{flag}; it is called --{meant[0]}")


class NameTaken(UserError):
    """Another command has just made a run of this name. Nothing has been written."""


def run_training(run: RunFolder, experiment: str, config: ExperimentConfig, where: Launch, *, is_new: bool) -> int:
    """Creates or continues the run, here or on Slurm; returns the exit code.

    A run that `is_new` is never another command's: NameTaken if there is one of its name by now.
    """
    config = with_notify(config, where)
    check_settings(config, where.least)
    if is_finished(run, config):
        print(f"{run} is finished: {config.train.steps:,} steps. `resume {run} --train.steps N` trains longer.")
        return 0
    if isinstance(where, LaunchTraining):
        where = where.settled(run, config)
    place = where.place(run)
    precision = precision_of(run, config.train.precision, "auto")
    job = TrainJob(run.path, where.processes, where.resolve_device(place, precision), where.retries_at(place))
    if where.dry_run:
        return show({"experiment": experiment, **asdict(config)}, place.describe(job))
    # What can be refused or fail comes before the folder is made, so that no run is left behind.
    _check_idle(run)
    place.check(job)
    config.data.prepare(print)
    if is_new:
        create(run, experiment, config, {"resources": {"processes": job.processes, "device": job.device}})
    with ownership.locked(run.path) as descriptor:
        if descriptor is None:
            process = run.read_status().get("pid")
            raise UserError(
                f"{run} is running already (process {process} on this machine)"
                if process
                else f"{run} is being started already, by another command on this machine"
            )
        _check_idle(run)  # again: another command may have submitted it in the meantime
        run.write_experiment(experiment, config)
        run.clear_failure()
        faults.forgive(run)
        if run.read_status().get("step", 0) < config.train.steps:  # not if it is only drawn again
            notify.rearm(run)
        if isinstance(place, Here):
            return place.run(replace(job, begun=now()), keep_open=[descriptor])
        where.copy_code(place)
        # The lock guards what the launcher writes, up to the job's id. The job takes the run over with a token.
        place.run(job)
    if where.wait:
        place.wait(lambda: run.read_launch().get("job_ids", []), lambda: states.lives(run))
    return 0 if not where.wait or run.state() is State.FINISHED else 1


def with_notify(config: ExperimentConfig, where: Launch) -> ExperimentConfig:
    """Lets people be told as the profile says, unless the settings say it; raises UserError where that cannot be."""
    channels: Any = config.tracking.notify
    if channels is None:
        channels = load_profile(where.profile, given(where.slurm)).notify or None
    notify.check(channels or ())
    return replace(config, tracking=replace(config.tracking, notify=channels))


def create(run: RunFolder, experiment: str, config: ExperimentConfig, facts: dict[str, Any]) -> None:
    """Makes the run's folder; raises NameTaken if it is there, UserError if it cannot be made."""
    try:
        run.create(experiment, config, provenance.describe(**facts), provenance.save_code)
    except FileExistsError:
        raise NameTaken(f"{run} has just been made by another command; the same command again continues it") from None
    except OSError as error:
        # Of a full disk it would name a file that is gone again.
        why = error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else reason(error)
        raise UserError(f"{run} cannot be made: {why}") from error


def check_settings(config: ExperimentConfig, processes: int) -> None:
    """Raises UserError if the batch cannot be cut into a shard for each process, or wandb would refuse the project."""
    config.tracking.check()
    if processes > (config.train.grad_shards or 1) and config.train.batch_size % processes:
        raise UserError(
            "train.batch-size must be a multiple of the number of GPUs; "
            f"got train.batch-size={config.train.batch_size} on {processes} GPUs"
        )


def as_begun(run: RunFolder, config: ExperimentConfig, where: Where) -> ExperimentConfig:
    """Returns the settings with those decided that a run keeps from its first start on, unless another one is given.

    These are the shards of the gradient, for a new run one for each process (of a range as many as divide the batch),
    held-out losses, whether it is compiled, and settings of today that a run of an earlier version has begun without.
    """
    train = config.train
    if run.exists():
        experiment, old = run.read_experiment()
        if train.grad_shards is None:
            train = replace(train, grad_shards=old.train.grad_shards)
        preset = EXPERIMENTS[experiment].preset.train
        for name in experiment_json.missing((run.path / "experiment.json").read_text()) | {"held_out_every", "compile"}:
            # A command line does not tell whether the preset's value was typed, so it counts as not given.
            if getattr(train, name) == getattr(preset, name):
                train = replace(train, **{name: getattr(old.train, name)})
    elif train.grad_shards is None:
        sizes = (size for size in range(where.processes, where.least - 1, -1) if train.batch_size % size == 0)
        train = replace(train, grad_shards=next(sizes, None))
    config = replace(config, train=train)
    check_settings(config, where.least)
    return config


def _check_idle(run: RunFolder) -> None:
    """Raises UserError if a Slurm job of the run waits or runs, or another machine is seen at work on it.

    That may be for a colleague, whose jobs this user's Slurm does not list, or in reach of no Slurm at all.
    """
    for job_id, state in queue.active(run.read_launch().get("job_ids", [])).items():
        raise UserError(f"{run} is on Slurm already: job {job_id} is {state}")
    seen, deadline = run.read_status(), time.monotonic() + states.BEAT_S
    if seen.get("host") == platform.node() or not states.beats(run):
        return
    print(f"{run} was at work on {seen['host']} a moment ago; looking whether it lives.", file=sys.stderr)
    # By this machine's clock: the other one's may be ahead, or behind.
    while states.beats(run) and time.monotonic() < deadline:
        if run.read_status().get("updated") != seen.get("updated"):
            raise UserError(f"{run} is at work on {seen['host']}")
        time.sleep(HEARTBEAT_S / 2)


def check_same_settings(run: RunFolder, experiment: str, config: ExperimentConfig) -> None:
    """Raises UserError naming each setting that differs from the run's and may not."""
    name, old = run.read_experiment()
    if name != experiment:
        raise UserError(f"{run} is a run of {name}, not of {experiment}; choose another --name")
    changed = [
        f"{flag} is {was}, not {now}"
        for flag, was, now in experiment_json.differences(old, config)
        if flag not in MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"{run} exists with other settings: {'; '.join(changed)}. Choose another --name or the same settings; "
            f"python launch.py resume {run} continues it with its own"
        )


def is_finished(run: RunFolder, config: ExperimentConfig) -> bool:
    """Whether nothing is left to do: all steps are made, their figures are drawn, and the last checkpoint is good."""
    status = run.read_status() if run.exists() else {}
    is_trained = status.get("state") == State.FINISHED and status["step"] >= config.train.steps
    if not is_trained or status.get("missing") is not None:
        return False
    try:
        checkpoints.verify(run.checkpoints, status["step"])
    except CorruptCheckpoint as error:
        print(f"{run} has finished, but {error}: the steps since the last good one are made again.", file=sys.stderr)
        return False
    return True
