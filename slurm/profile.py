"""Settings of a site: partition, account, resources. They come from a TOML file and from the command line."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from slurm import queue
from slurm.errors import UserError

FOLDER = Path(__file__).parent / "profiles"


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
    gpus_per_node: int = 8
    """GPUs of one node; a job with more of them takes several whole nodes."""
    cpus_per_gpu: int = 4
    """CPU cores for each GPU's process."""
    mem_gb: int | None = None
    """Memory of a job on each of its nodes, in GB."""
    time_min: int = 60
    """Time limit in minutes. A job that needs longer saves itself before the limit and is queued again."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a job is told to save."""
    poll_s: int = queue.POLL_S
    """Most seconds between two questions to Slurm about a job that is waited for."""
    notify: tuple[str, ...] = ()
    """How people are told that a run has finished, has failed or hangs, unless --tracking.notify says: mail, ..."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the job, such as `module load cuda`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "cpus_per_gpu", "time_min", "signal_delay_s", "poll_s"):
            if getattr(self, name) < 1:
                raise UserError(f"slurm.{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if self.mem_gb is not None and self.mem_gb < 1:
            raise UserError(f"slurm.mem-gb must be at least 1; got {self.mem_gb}")


def load(name: str | None, overrides: dict[str, Any]) -> Profile:
    """The profile of this name (a file in slurm/profiles) or path, None being the defaults, with fields replaced.

    Raises UserError naming what is wrong.
    """
    return replace(read(_path(name)) if name is not None else Profile(), **overrides)


def read(path: Path) -> Profile:
    """The profile in a TOML file; raises UserError naming the key that is wrong."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"profile {path} cannot be read: {error}") from None
    hints = get_type_hints(Profile)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"profile {path}: {key} is no key of a profile; they are {', '.join(hints)}")
        if not _fits(value, hints[key]):
            raise UserError(f"profile {path}: {key} must be {_describe(hints[key])}; got {value!r}")
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Profile(**values)


def _path(name: str) -> Path:
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    if name in known:
        return FOLDER / f"{name}.toml"
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"--profile must be a TOML file or one of {', '.join(known)}; got {name}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(line, str) for line in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
    kinds = tuple(kind for kind in get_args(hint) or (hint,) if kind is not type(None))
    return isinstance(value, kinds) and not isinstance(value, bool)


def _describe(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "a list of strings"
    if get_origin(hint) is dict:
        return "a table of strings"
    return "a number" if int in (get_args(hint) or (hint,)) else "a string"
