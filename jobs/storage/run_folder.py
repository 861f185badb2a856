"""A run's folder: where its files lie, and how it is found and made."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from diffusion.errors import UserError
from jobs.experiments import experiment_json
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.table import EXPERIMENTS
from jobs.files import write_atomically, write_json
from jobs.storage import ownership

# A leading dot marks what is still being made, and a leading dash would be read as a flag.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SAMPLES_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")  # `+` for dpm++

JobKind = Literal["job_ids", "sample_job_ids", "evaluate_job_ids"]
LAUNCH_LOCK = ".launch.lock"
OWN = ("job_ids", "sample_job_ids", "evaluate_job_ids", "wandb_id", "sweep", "point")
"""What of launch.json belongs to one run alone, and not to a copy of its folder."""


class State(StrEnum):
    """What a run is doing, as status.json says it; a StrEnum, so that JSON holds these words."""

    CREATED = "created"
    """It has a folder and no status yet."""
    QUEUED = "queued"
    RUNNING = "running"
    REQUEUED = "requeued"
    """A job of it has ended, and the next one waits."""
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Ctrl-C, or a signal that does not queue it again."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class RunFolder:
    """The files of one run; the folder itself may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.quality = self.path / "quality.jsonl"
        self.status = self.path / "status.json"
        self.log = self.path / "log.txt"
        self.figures = self.path / "figures"
        self.samples = self.path / "samples"
        self.code = self.path / "code"

    def __str__(self) -> str:
        return as_typed(self.path)

    @property
    def label(self) -> str:
        """The run's name for people: EXPERIMENT/NAME."""
        return f"{self.path.parent.name}/{self.path.name}"

    def exists(self) -> bool:
        return (self.path / "experiment.json").is_file()

    def create(
        self, experiment: str, config: ExperimentConfig, launch: dict[str, Any], save_code: Callable[[Path], None]
    ) -> None:
        """Makes the folder with everything that the job needs, whole or not at all; FileExistsError if it is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not the process's id: commands on two machines may have the same one.
        made = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            made.mkdir()
            for folder in ("checkpoints", "figures", "samples"):
                (made / folder).mkdir()
            with ownership.locked(made):
                pass  # it raises UserError where files cannot be locked
            save_code(made / "code")
            write_json(made / "launch.json", {**launch, "folder": str(self.path)})
            write_atomically(made / "experiment.json", experiment_json.write(experiment, config))
            try:
                made.rename(self.path)  # which refuses a folder that is there, unless it is empty
            except OSError as error:
                raise FileExistsError(self.path) if self.exists() else error from None
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def read_experiment(self) -> tuple[str, ExperimentConfig]:
        """(name, settings) from experiment.json; raises UserError if this is no run folder."""
        path = self.path / "experiment.json"
        try:
            return experiment_json.read(path.read_text())
        except FileNotFoundError:
            raise UserError(f"a run folder holds experiment.json; {self} does not") from None
        except (OSError, ValueError) as error:
            raise UserError(f"experiment.json of {self} cannot be read: {error}") from error

    def write_experiment(self, experiment: str, config: ExperimentConfig) -> None:
        write_atomically(self.path / "experiment.json", experiment_json.write(experiment, config))

    def read_status(self) -> dict[str, Any]:
        """Reads status.json; {} before the run has written any, and where a power cut has left an empty file."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.status.stat().st_size == 0:
                return {}
        return _read_json(self.status)

    def state(self) -> State:
        """The state that status.json says, whether it is still true or not; CREATED if it is no state of ours."""
        word = self.read_status().get("state")
        return State(word) if word in list(State) else State.CREATED

    def write_failure(self, rank: int, trace: str, **facts: Any) -> bool:
        """Records why a process failed, if it is the first of the job that did; returns whether it is.

        With `state` among the facts, that is the run's state from now on. Without it, somebody is going to decide.
        """
        path = self.path / ".failure.json"
        mine = path.with_name(f"{path.name}.{rank}")
        write_json(mine, {"failed_rank": rank, "traceback": trace, **facts})
        try:
            try:
                os.link(mine, path)  # only one of several processes can make it, and its file is complete already
                is_first = True
            except FileExistsError:
                is_first = mine.stat().st_nlink > 1  # on NFS, link may say that of what it has made itself
        except OSError:  # a file system without links: then there may be two first ones
            mine.replace(path)
            is_first = True
        finally:
            mine.unlink(missing_ok=True)
        known = self.read_failure()
        is_last = "state" in facts and "state" not in known  # whoever was going to decide has decided
        if is_last:
            write_json(path, {**known, **facts})
        if is_first or is_last:
            write_json(self.status, {**self.read_status(), **self.final_failure()})
        return is_first

    def read_failure(self) -> dict[str, Any]:
        """Reads what the first failing process wrote; {} if none has failed."""
        return _read_json(self.path / ".failure.json")

    def final_failure(self) -> dict[str, Any]:
        """Reads what status.json says of a failure for good; {} if there is none."""
        failure = self.read_failure()
        return {name: failure[name] for name in ("state", "failed_rank", "traceback")} if "state" in failure else {}

    def clear_failure(self) -> None:
        """Forgets the failure before the run is continued."""
        (self.path / ".failure.json").unlink(missing_ok=True)

    def read_launch(self) -> dict[str, Any]:
        """Reads launch.json; {} if it was lost when the folder was copied.

        In a copy of another run's folder it lacks what is the other run's alone: its jobs, and its id in wandb. A
        folder that has been moved is the same run.
        """
        launch = _read_json(self.path / "launch.json")
        if self._is_copy(launch):
            return {name: value for name, value in launch.items() if name not in OWN}
        return launch

    def _is_copy(self, launch: Mapping[str, Any]) -> bool:
        """Whether the run that launch.json was written for is another folder, which is still there."""
        home = Path(launch.get("folder", self.path))
        if home == self.path or "wandb_id" not in launch:
            return False
        try:
            # A copy has the same id as its original. So has a run that was moved, but then nothing is left at its old
            # place.
            same_id = _read_json(home / "launch.json").get("wandb_id") == launch["wandb_id"]
            return same_id and not home.samefile(self.path)  # it may have two paths
        except (OSError, UserError):
            return False

    def told(self, event: str) -> Path:
        """Returns the file that is there once people have been told of an event of the run."""
        return self.path / f".told-{event}"

    def read_samples(self, name: str) -> dict[str, Any]:
        """manifest.json of a set of samples: its settings, `num_samples`, and whether it is `complete`; {} if none."""
        return _read_json(self.samples / name / "manifest.json")

    def sets(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields the manifest of each set of samples and what it says, unless it is damaged or just being deleted."""
        for path in self.samples.glob("[!.]*/manifest.json"):
            with suppress(OSError, UserError):
                yield path, self.read_samples(path.parent.name)

    def drawn_steps(self) -> set[int]:
        """The steps of the checkpoints that sets of samples still need: a job that draws them may wait for hours."""
        begun = [known for _, known in self.sets() if "step" in known and known.get("complete") is False]
        weak = {known["autoguidance"]["step"] for known in begun if known.get("autoguidance")}
        return weak | {known["step"] for known in begun}

    def add_job(self, kind: JobKind, job_id: str, listed: Path | None = None) -> None:
        """Remembers a Slurm job of the run, as `cancel` and `status` need it, and in the list of what it works on."""
        with self._changing():
            self._update(**{kind: [*self.read_launch().get(kind, []), job_id]})
            if listed is not None:
                write_json(listed, [*self.jobs_in(listed, kind), job_id])

    def jobs_in(self, listed: Path, kind: JobKind) -> list[str]:
        """Reads those of a list of ids of Slurm jobs that are the run's own; [] if there is no list.

        Raises UserError for a damaged file.
        """
        ids, own = _json_in(listed), self.read_launch().get(kind, [])
        return [job_id for job_id in ids if job_id in own] if isinstance(ids, list) else []

    def update_launch(self, **values: Any) -> None:
        with self._changing():
            self._update(**values)

    def _changing(self) -> AbstractContextManager[None]:
        """Keeps others from changing launch.json and lists of jobs meanwhile: elements of an array do, and commands."""
        return ownership.for_a_moment(self.path / LAUNCH_LOCK)

    def _update(self, **values: Any) -> None:
        write_json(self.path / "launch.json", {**self.read_launch(), "folder": str(self.path), **values})


def number_of_shards(num_samples: int, shard_size: int) -> int:
    """Into how many shards a set of samples is cut; the last one may be shorter."""
    return -(-num_samples // shard_size)


def as_typed(path: Path) -> str:
    """An absolute path as a user would type it: from the working folder on where it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def not_yours(error: PermissionError) -> str | None:
    """Says whose run it is that the user cannot write to; None if the error is about anything else."""
    path = Path(os.fsdecode(error.filename)).absolute()
    # os.path, because methods of Path raise where a folder may not be looked into.
    folder = next((parent for parent in path.parents if os.path.isfile(parent / "experiment.json")), None)
    if folder is None or folder.stat().st_uid == os.geteuid():
        return None
    try:
        owner = folder.owner()
    except KeyError:
        owner = f"user {folder.stat().st_uid}"
    # A lock is the owner's to read and write, and only taken by who wants to change something.
    if os.path.exists(path) and not os.access(path, os.R_OK) and not path.name.startswith("."):
        return f"{RunFolder(folder)} belongs to {owner}, and you may not read {path.name} there"
    return (
        f"{RunFolder(folder)} belongs to {owner}, and you may not write to it: status, logs, export and "
        "report --out FILE only read it; a copy in a folder of your own (cp -r) is another run, and yours"
    )


def check_name(name: str, pattern: re.Pattern[str] = NAME) -> str:
    """Returns the name; raises UserError if it is not one."""
    if not pattern.fullmatch(name):
        more = ", '+'" if pattern is SAMPLES_NAME else ""
        raise UserError(
            f"a name is made of letters, digits, '.', '_'{more} and '-', and does not begin with '.' or '-'; "
            f"got {name!r}"
        )
    return name


def new_name(experiment_folder: Path) -> str:
    """Makes a name of date and time, with a number behind it if a run of this second exists already."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{i}" for i in range(2, 1000))]
    return next(name for name in names if not (experiment_folder / name).exists())


def find(run: str, runs_dir: Path) -> RunFolder:
    """The run that a user means: a folder, EXPERIMENT/NAME, or the last created run of EXPERIMENT.

    Raises UserError if there is none.
    """
    for folder in (Path(run), runs_dir / run):
        if (folder / "experiment.json").is_file():
            return RunFolder(folder)
    if run in EXPERIMENTS:
        runs = [RunFolder(path.parent) for path in (runs_dir / run).glob("[!.]*/experiment.json")]
        if not runs:
            raise UserError(f"there is no run of {run} in {runs_dir} yet; start one with: python launch.py train {run}")
        return max(runs, key=_created)
    if Path(run).is_dir():
        near = [*sorted(Path(run).glob("[!.]*/experiment.json")), *(p / "experiment.json" for p in Path(run).parents)]
        meant = next((f"; {path.parent} does" for path in near if path.is_file()), "")
        raise UserError(f"a run folder holds experiment.json; {run} does not{meant}")
    if not runs_dir.is_dir():
        raise UserError(
            f"the folder {runs_dir}, which may hold the run {run!r}, is not there; --runs-dir DIR is that of your runs"
        )
    raise UserError(
        f"there is no run {run!r} in {runs_dir}, which `python launch.py status` lists; "
        f"RUN is a run folder, EXPERIMENT/NAME or one of {', '.join(EXPERIMENTS)}"
    )


def _created(run: RunFolder) -> str:
    """When the run was created; a run whose launch.json cannot be read counts as the oldest."""
    try:
        return str(run.read_launch().get("created", ""))
    except (OSError, UserError):
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    value = _json_in(path)
    return value if isinstance(value, dict) else {}


def _json_in(path: Path) -> Any:
    """What the file holds, None if it is not there."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
