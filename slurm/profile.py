"""Settings of a site: partition, account, resources. They come from a TOML file and from the command line."""

import os
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from slurm import queue
from slurm.errors import UserError

FOLDER = Path(__file__).parent / "profiles"
GpuRequest = Literal["gpus-per-node", "gres", "gpus-per-task", "none"]
MEMORY = ("mem_gb", "mem_per_gpu_gb", "mem_per_cpu_gb")
"""Three ways to ask for memory, of which Slurm takes one."""
ONLY_IN_FILES = ("setup", "environment", "srun_args", "sbatch", "cpu", "notify")
"""Lists and tables, which have no flag."""
_LAUNCHERS_OWN = ("array", "chdir", "dependency", "error", "job-name", "nodes", "open-mode", "output", "signal", "time")
"""Flags of sbatch that the launcher sets itself; without them a run could be lost."""
PLAIN = {**{key: key for key in ("partition", "account", "qos", "constraint", "exclude")}, "clusters": "cluster"}
"""Flags of sbatch, and the keys that hold their values as sbatch takes them."""
_KEYS = {
    **PLAIN,
    "ntasks": "ntasks",
    "ntasks-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_gpu",
    "gpus-per-node": "gpu_request",
    "gpus-per-task": "gpu_request",
    "mem": "mem_gb",
    "mem-per-gpu": "mem_per_gpu_gb",
    "mem-per-cpu": "mem_per_cpu_gb",
}
"""Flags of sbatch whose values have a key of their own."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Resources and settings of jobs on one cluster."""

    partition: str | None = None
    """Partition that jobs are sent to."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, such as a100|h100."""
    exclude: str | None = None
    """Nodes to leave out, such as n[3,17]."""
    cluster: str | None = None
    """Cluster to submit to, where there are several: sbatch -M."""
    gpu_request: GpuRequest = "gpus-per-node"
    """How the site wants GPUs to be asked for; with none, the table sbatch may ask for them."""
    gpu_type: str | None = None
    """Type of GPU, such as a100, where the site wants one."""
    gpus_per_node: int = 8
    """GPUs of one node; a job with more of them takes several whole nodes."""
    cpus_per_gpu: int = 4
    """CPU cores for each GPU's process."""
    mem_gb: int | None = None
    """Memory of a job on each of its nodes, in GB; 0 is all memory of a node."""
    mem_per_gpu_gb: int | None = None
    """Memory for each GPU, in GB."""
    mem_per_cpu_gb: int | None = None
    """Memory for each CPU core, in GB."""
    ntasks: bool = False
    """Say --ntasks, too, where the site insists on it."""
    max_jobs: int | None = None
    """Jobs that you may have in the queue at once, elements of arrays included; arrays are kept smaller."""
    time_min: int = 60
    """Time limit in minutes. A job that needs longer saves itself before the limit and is queued again."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a job is told to save."""
    python: str | None = None
    """Command that starts Python, such as `apptainer exec --nv image.sif python`."""
    host_suffix: str = ""
    """What makes a node's name that of its fast network: with i, node07 is reached as node07i."""
    interface: str | None = None
    """Network interface of NCCL and gloo, such as ib0; auto finds the fast ones that are up."""
    poll_s: int = queue.POLL_S
    """Most seconds between two questions to Slurm about a job that is waited for."""
    notify: tuple[str, ...] = ()
    """How people are told that a run has finished, has failed or hangs, unless --tracking.notify says: mail, ..."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the job, such as `module load cuda`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    srun_args: tuple[str, ...] = ()
    """Further arguments of srun, such as --container-image=..."""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    """Further flags of sbatch; false takes one away, {gpus} stands for the number of GPUs on a node."""
    cpu: dict[str, Any] = field(default_factory=dict)
    """Keys that differ for jobs without GPUs, such as the one that merges samples; false takes one away."""

    def __post_init__(self) -> None:
        # mem_gb=0 is all memory of a node; an array and the job that follows it are two jobs.
        least = {"mem_gb": 0, "max_jobs": 2, **dict.fromkeys(("mem_per_gpu_gb", "mem_per_cpu_gb"), 1)}
        least |= dict.fromkeys(("gpus_per_node", "cpus_per_gpu", "time_min", "signal_delay_s", "poll_s"), 1)
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise UserError(f"{_flag(name)} must be at least {minimum}; got {value}")
        if (
            len(said := [f"{_flag(name)}={getattr(self, name)}" for name in MEMORY if getattr(self, name) is not None])
            > 1
        ):
            raise UserError(f"memory is asked for in one way; got {' and '.join(said)}")
        if self.signal_delay_s >= 60 * self.time_min:
            raise UserError(
                f"slurm.signal-delay-s must be less than the time limit, or a job would be told to stop before it "
                f"starts; got {self.signal_delay_s} s with slurm.time-min={self.time_min}"
            )
        if self.gpu_request == "none" and self.gpu_type is not None:
            raise UserError(f"slurm.gpu-type={self.gpu_type} needs a slurm.gpu-request; got none")
        if self.interface is not None and (twice := [name for name in self.environment if name in INTERFACES]):
            raise UserError(f"slurm.interface={self.interface} sets {twice[0]}, which environment sets as well")
        for flag, value in self.sbatch.items():
            self._check_flag(flag, value)
        if self.cpu:
            # Checked now, and not only when an array is submitted with its merge.
            self.without_gpus()

    def _check_flag(self, flag: str, value: str | int | bool) -> None:
        if not re.fullmatch("[a-z][a-z-]+", flag):
            raise UserError(f"[sbatch] holds long names of sbatch's flags without their dashes; got {flag}")
        if flag in _LAUNCHERS_OWN:
            key = "; use time_min" if flag == "time" else ""
            raise UserError(f"[sbatch] {flag} is the launcher's own: it sets this so that no run is lost{key}")
        if value is not False and flag in _KEYS:
            raise UserError(f"[sbatch] {flag} has a key of its own in a profile: {_KEYS[flag]}")
        if flag == "gres" and self.gpu_request != "none" and re.search(r"(^|,|/)gpu\b", str(value)):
            raise UserError(f"[sbatch] gres={value} and gpu_request={self.gpu_request} would both ask for GPUs")

    def without_gpus(self) -> "Profile":
        """Returns what holds for jobs that need no GPU."""
        defaults = Profile()
        changed = {key: getattr(defaults, key) if value is False else value for key, value in self.cpu.items()}
        # Without the table: __post_init__ checks it by calling this, and would never come to an end.
        return _replaced(replace(self, cpu={}), changed)


INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables that name the network interface."""


def load(name: str | None, overrides: dict[str, Any]) -> Profile:
    """The profile of this name (a file in slurm/profiles) or path, None being the default one, with fields replaced.

    Raises UserError naming what is wrong.
    """
    path = _default() if name is None else _path(name, "--profile")
    return _replaced(read(path) if path is not None else Profile(), overrides)


def _replaced(profile: Profile, changes: dict[str, Any]) -> Profile:
    if any(changes.get(name) is not None for name in MEMORY):  # one way to ask for memory replaces the others
        changes = dict.fromkeys(MEMORY) | changes
    return replace(profile, **changes)


def read(path: Path) -> Profile:
    """The profile in a TOML file; raises UserError naming the key that is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"profile {path} cannot be read: {error}") from None
    cpu = values.get("cpu")
    if isinstance(cpu, dict):
        cpu = values["cpu"] = _checked(cpu, f"{path}, [cpu]", [key for key in Profile.__annotations__ if key != "cpu"])
    return Profile(**_checked(values, str(path), list(Profile.__annotations__)))


def _checked(values: dict[str, Any], where: str, keys: list[str]) -> dict[str, Any]:
    """Returns the values as the fields of a profile hold them; raises UserError naming the key that is wrong."""
    hints = get_type_hints(Profile)
    for key, value in values.items():
        if key not in keys:
            raise UserError(f"profile {where}: {key} is no key of a profile; they are {', '.join(keys)}")
        # In the table [cpu] false takes a key away, whatever its type is.
        taken_away = "cpu" not in keys and value is False
        if not taken_away and not _fits(value, hints[key]):
            raise UserError(f"profile {where}: {key} must be {_describe(hints[key])}; got {value!r}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _default() -> Path | None:
    """Finds the profile that holds where none is named; None if there is none, or the variable is empty."""
    if (name := os.environ.get("DIFFUSION_PROFILE")) is not None:
        return _path(name, "DIFFUSION_PROFILE") if name else None
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    places = (FOLDER / "default.toml", home / "diffusion-launcher" / "default.toml")
    return next((path for path in places if path.exists()), None)


def _path(name: str, asked_by: str) -> Path:
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    if name in known:
        return FOLDER / f"{name}.toml"
    if (path := Path(name).expanduser()).is_file():
        return path
    raise UserError(
        f"{asked_by} must be a TOML file or one of {', '.join(known)}; got {name}: "
        f"`python launch.py doctor --write-profile NAME` writes one on a login node"
    )


def _flag(name: str) -> str:
    return f"slurm.{name.replace('_', '-')}"


def _fits(value: Any, hint: Any) -> bool:
    origin, kinds = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in kinds
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value)
    if origin is dict:
        return isinstance(value, dict) and all(kinds[1] is Any or _fits(entry, kinds[1]) for entry in value.values())
    # To Python True is an int, too; in a profile it is none.
    if isinstance(value, bool):
        return bool in (kinds or (hint,))
    return isinstance(value, tuple(kind for kind in kinds or (hint,) if kind is not type(None)))


def _describe(hint: Any) -> str:
    origin, kinds = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(kinds)}"
    if origin is tuple:
        return "a list of strings"
    if origin is dict:
        return f"a table of {'strings' if kinds[1] is str else 'values'}"
    named = {int: "a number", bool: "true or false", str: "a string"}
    return next(words for kind, words in named.items() if kind in (kinds or (hint,)))
