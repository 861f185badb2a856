"""Where a job runs: the flags that are shared by all commands that start one."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from diffusion.settings import SettingsError
from jobs.storage.run_folder import RunFolder
from slurm import queue
from slurm.place import Here, OnSlurm
from slurm.profile import load as load_profile

if TYPE_CHECKING:
    from jobs.runtime.numerics import Asked


def optional(metavar: str, default: str) -> Any:
    """Lets the help show an option whose default is None with what None stands for."""
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
        site = load_profile(self.profile, given(self.slurm))
        return OnSlurm(self.processes, site, self.device != "cpu", run.label, run.path / "slurm", run.code)

    def on_slurm(self) -> bool:
        """Whether the job goes to Slurm; raises ValueError if it should and cannot."""
        if self.cluster == "slurm" and not queue.has_slurm():
            raise ValueError(
                "--cluster slurm needs sbatch and a controller that answers `scontrol ping`; there is none here"
            )
        return self.cluster == "slurm" or (self.cluster == "auto" and queue.is_available())

    def resolve_device(self, place: Here | OnSlurm, precision: "Asked" = "auto") -> Literal["cuda", "cpu"]:
        """The kind of device; raises ValueError where GPUs or a precision are asked for that are not there."""
        if isinstance(place, OnSlurm):
            return "cpu" if self.device == "cpu" else "cuda"
        from jobs.runtime.numerics import (  # imports torch, which this machine is about to use anyway
            lacking,
            resolve_device,
        )

        kind = resolve_device(self.device, self.gpus)
        if reason := lacking(precision, kind):
            raise ValueError(reason)
        return kind


@dataclass(frozen=True, kw_only=True)
class Launch(Where):
    """Where the job runs, and how it is started."""

    dry_run: bool = False
    """Show the settings and, for Slurm, the script; touch nothing."""
    wait: bool = False
    """Stay until the Slurm job has ended."""


def given(changes: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None."""
    return {f.name: getattr(changes, f.name) for f in fields(changes) if getattr(changes, f.name) is not None}


def show(settings: dict[str, Any], place: str) -> int:
    """Prints what a dry run shows."""
    print(json.dumps(settings, indent=2))
    print(place)
    return 0
