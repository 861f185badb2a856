"""Where a job runs: the flags that are shared by all commands that start one."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from tyro.conf import arg

from commands.arguments import RunsDir, optional
from diffusion.errors import UserError
from jobs.experiments.configs import ExperimentConfig
from jobs.storage.checkpoints import Named
from jobs.storage.provenance import code_folder, save_code
from jobs.storage.run_folder import RunFolder
from slurm import allocation, queue
from slurm.environment import copies
from slurm.errors import SlurmError
from slurm.errors import UserError as SlurmUserError
from slurm.place import Here, OnSlurm
from slurm.profile import ONLY_IN_FILES, Profile
from slurm.profile import load as load_profile

if TYPE_CHECKING:
    from jobs.runtime.numerics import Asked


PATIENCE_S = 30
"""How long --cluster slurm waits for a controller that is slow to answer."""


class SlurmSilent(UserError):
    """The machine belongs to a cluster whose controller does not answer. Never a reason to train on a login node."""


Checkpoint = Annotated[
    Named | None,
    arg(
        metavar="{STEP,best}",
        help="Step of the checkpoint, or best: the one with the lowest held-out loss.",
        help_behavior_hint="(default: the newest)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the data of a run lie now."""

    root: Annotated[str | None, optional("DIR", "where it was")] = None
    """Folder of the data set, if it has moved."""


class Unchanged(Enum):
    """The default of an option whose None is a value."""

    as_it_was = 0


def changes(settings: type, hint: Callable[[Field[Any]], str | None]) -> Any:
    """Makes a class with an option for each field of `settings` for whose default `hint` returns words for the help.

    It inherits from `settings`, where tyro finds what a field means: names, types and help have their home there.
    """
    options: list[tuple[str, Any, Any]] = []
    for known in fields(settings):
        if (default := hint(known)) is None:
            options.append((known.name, ClassVar[Any], None))  # no field of this class
        else:
            kind: Any = known.type
            kind = Annotated[kind | Unchanged, optional(_metavar(kind), default)]
            options.append((known.name, kind, field(default=Unchanged.as_it_was)))
    return make_dataclass(
        f"{settings.__name__}Changes",
        options,
        bases=(settings,),
        # Most are unchanged here, which the checks of `settings` would refuse; they run where these are put into one.
        namespace={"__post_init__": lambda self: None, "__doc__": settings.__doc__},
        frozen=True,
        kw_only=True,
    )


def _metavar(kind: Any) -> str:
    """How the help shows a value of this type."""
    names = {int: "INT", float: "FLOAT", str: "NAME", bool: "{True,False}"}
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        return f"[{_metavar(get_args(kind)[0])} ...]"
    return names.get(kind) or _metavar(next(member for member in get_args(kind) if member is not type(None)))


def _of_the_profile(known: Field[Any]) -> str | None:
    """What a setting of Slurm is unless it is given; None for what only a profile can say."""
    if known.name in ONLY_IN_FILES:
        return None
    return "the profile's" if known.default in (None, "") else f"the profile's, or {known.default}"


SlurmChanges = changes(Profile, _of_the_profile)
"""What to ask Slurm for; replaces what the profile says."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the job runs."""

    cluster: Literal["auto", "local", "slurm"] = "auto"
    """auto is Slurm where there is one; from within a job, such as an salloc, it is that job's nodes."""
    gpus: Annotated[str | None, optional("INT", "one")] = None
    """Number of GPUs in all; with --device cpu, number of processes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is a GPU where there is one."""
    runs_dir: RunsDir = Path("runs")
    profile: Annotated[str | None, optional("NAME", "the default one")] = None
    """Slurm settings of a site: a TOML file, or the name of one in slurm/profiles."""
    slurm: Annotated[
        Any, arg(constructor=SlurmChanges, help="What to ask Slurm for; replaces what the profile says.")
    ] = field(default_factory=SlurmChanges)

    takes_range: ClassVar[bool] = False
    """Whether --gpus may be a range."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(-\d+)?" if self.takes_range else r"\d+", self.gpus or "1"):
            more = ", or a range such as 2-8" if self.takes_range else "; train and resume alone take a range"
            raise UserError(f"--gpus must be a number{more}; got {self.gpus}")
        if not 1 <= self.least <= self.processes:
            rule = "at least 1" if self.least == self.processes else "a range from fewer to more, such as 2-8"
            raise UserError(f"--gpus must be {rule}; got {self.gpus}")
        if self.profile is not None or given(self.slurm):
            self._site()  # also where nothing runs: a wrong word must not be noticed only when it counts

    @property
    def processes(self) -> int:
        """How many processes the job has; of a range, the largest number."""
        return int((self.gpus or "1").rpartition("-")[2])

    @property
    def least(self) -> int:
        """The smallest number of the range in --gpus."""
        return int((self.gpus or "1").partition("-")[0])

    def place(self, run: RunFolder) -> Here | OnSlurm:
        """Where a job of the run is to run; raises UserError where that cannot be."""
        site = self._site()
        if (started := copies()) > 1:
            raise UserError(
                f"this command must be started once, and by itself: --gpus {started} starts {started} processes; "
                f"torchrun or mpirun has started it {started} times"
            )
        if not self.on_slurm():
            return Here(self.processes, self._step(), run.path)
        return OnSlurm(self.processes, site, self.device != "cpu", run.label, run.path / "slurm", code_folder(run.path))

    def _site(self) -> Profile:
        return load_profile(self.profile, given(self.slurm))

    def _step(self) -> allocation.Step | None:
        """The part of the allocation around this process that the job takes, None if it stays on this machine."""
        around = allocation.around_us() if self.cluster == "auto" and self.processes > 1 else None
        if around is None or (self.device == "cuda" and not around.gpus_per_node):
            return None
        return around.step(self.processes, on_gpus=self.device != "cpu" and around.gpus_per_node > 0)

    def copy_code(self, place: OnSlurm) -> None:
        """Makes sure that a job on Slurm finds its copy of the code; says so if the run began with other code."""
        if not place.code.exists():
            if place.code.name != "code":
                print(f"The code has changed since this run began: the job runs a copy of today's, {place.code.name}/.")
            save_code(place.code)

    def on_slurm(self) -> bool:
        """Whether the job goes to Slurm; raises UserError if it should and cannot, SlurmSilent if nobody knows."""
        if self.cluster == "local" or (self.cluster == "auto" and "SLURM_JOB_ID" in os.environ):
            return False
        try:
            found = queue.has_slurm(patience_s=PATIENCE_S if self.cluster == "slurm" else 2)
        except SlurmError as error:
            ways = f"--cluster slurm waits {PATIENCE_S} s for an answer, " if self.cluster == "auto" else ""
            raise SlurmSilent(f"{error}; {ways}--cluster local runs on this machine") from None
        if self.cluster == "slurm" and not found:
            raise UserError(
                "--cluster slurm needs sbatch and a controller that answers `scontrol ping`; there is none here"
            )
        return found

    def resolve_device(self, place: Here | OnSlurm, precision: "Asked" = "auto") -> Literal["cuda", "cpu"]:
        """The kind of device; raises UserError where GPUs or a precision are asked for that are not there."""
        # This machine is not looked at: a login node often has no GPU, and the job runs on another one.
        if isinstance(place, OnSlurm):
            return "cpu" if self.device == "cpu" else "cuda"
        if place.step is not None:
            return "cuda" if place.step.on_gpus else "cpu"
        from jobs.runtime.numerics import (  # imports torch, which this machine is about to use anyway
            lacking,
            resolve_device,
        )

        kind = resolve_device(self.device, None if self.gpus is None else self.processes)
        if reason := lacking(precision, kind):
            raise UserError(reason)
        return kind


@dataclass(frozen=True, kw_only=True)
class Start(Where):
    """Where the job runs, and how it is started."""

    dry_run: bool = False
    """Show the settings and, for Slurm, the script; touch nothing."""
    wait: bool = False
    """Stay until the Slurm job has ended."""


@dataclass(frozen=True, kw_only=True)
class Launch(Start):
    """Where the job runs, how it is started, and how often."""

    retries: Annotated[int | None, optional("INT", "3 on Slurm, 0 here")] = None
    """How often the job is tried again after a fault of the machine, without progress between."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retries is not None and self.retries < 0:
            raise UserError(f"--retries must be at least 0; got {self.retries}")

    def retries_at(self, place: Here | OnSlurm) -> int:
        """How often a job is tried again at this place. Raises UserError where that cannot be."""
        if self.retries and isinstance(place, Here) and place.step is not None:
            raise UserError(
                "--retries is not for a job on several nodes of an allocation; "
                "--cluster slurm submits a job of its own, which is tried again"
            )
        if self.retries is not None:
            return self.retries
        return 3 if isinstance(place, OnSlurm) else 0


@dataclass(frozen=True, kw_only=True)
class LaunchTraining(Launch):
    """Where the job runs, on how many GPUs, and how it is started."""

    gpus: Annotated[str | None, optional("INT or INT-INT", "one")] = None
    """Number of GPUs in all; with --device cpu, number of processes. Of a range, such as 2-8, the job has as many as
    Slurm starts first, or as this machine has: the result is the same."""
    takes_range: ClassVar[bool] = True

    def settled(self, run: RunFolder, config: ExperimentConfig) -> "LaunchTraining":
        """Returns the same with one number out of the range; says on Slurm how it was chosen.

        Those are left that divide the shards of the gradient: bytes are the same, and no process waits for another.
        Raises UserError if there is none, or none of them can run.
        """
        if self.least == self.processes:
            return self
        shards = config.train.grad_shards
        if shards is None:  # its sums have followed the number of processes
            raise UserError(f"--gpus must be a number: {run} is of a version before ranges; got {self.gpus}")
        sizes = [size for size in range(self.processes, self.least - 1, -1) if shards % size == 0]
        if not sizes:
            raise UserError(
                f"--gpus must hold a divisor of train.grad-shards, {shards}, for the same bytes; got {self.gpus}"
            )
        choices = [replace(self, gpus=str(size)) for size in sizes]
        if not self.on_slurm():
            return next((choice for choice in choices if choice._fits(run)), choices[-1])  # which then says why not
        place, starts, said = choices[0].place(run), dict[int, str](), []
        assert isinstance(place, OnSlurm)
        for size in sizes:
            try:
                starts[size] = place.start_of(size)
                said.append(f"{size} {f'at {starts[size]}' if starts[size] else 'unknown'}")
            except SlurmUserError:  # said by Slurm, or that several nodes would not be filled
                said.append(f"{size} never")
        # If none can start, the command goes on with the smallest, and Slurm's words for it are the error.
        size = first_to_start(starts) if starts else sizes[-1]
        print(f"--gpus {self.gpus}, when Slurm would start them: {', '.join(said)}. It is asked for {size}.")
        return replace(self, gpus=str(size))

    def _fits(self, run: RunFolder) -> bool:
        """Whether this machine, or the allocation that it is in, has so many GPUs."""
        try:
            self.resolve_device(self.place(run))
        except (UserError, SlurmUserError):  # of two classes, because slurm/ may import nothing of diffusion/
            return False
        return True


LITTLE = timedelta(minutes=5)
"""A larger job is taken although it starts later, by this much at most."""


def first_to_start(starts: Mapping[int, str]) -> int:
    """Returns the number of GPUs that Slurm starts first, a larger one if it starts only a little later.

    `starts` has the times as Slurm writes them, or "" where it does not know. If it knows none, fewer wait less.
    """
    known = {size: datetime.fromisoformat(start) for size, start in starts.items() if start}
    if not known:
        return min(starts)
    return max(size for size, start in known.items() if start <= min(known.values()) + LITTLE)


def given(changes: Any) -> dict[str, Any]:
    """The options of `changes` that were given; None is a value."""
    values = {f.name: getattr(changes, f.name) for f in fields(changes)}
    return {name: value for name, value in values.items() if value is not Unchanged.as_it_was}


def show(settings: dict[str, Any], place: str) -> int:
    """Prints what a dry run shows."""
    print(json.dumps(settings, indent=2))
    print(place)
    return 0
