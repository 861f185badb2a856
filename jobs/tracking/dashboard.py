"""wandb, for the process that follows a run: online where that works, otherwise offline."""

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from jobs.tracking.identity import Identity, Machine, short
from jobs.tracking.server import address, public, why_not_online, wrong_variables

Say = Callable[[str], None]
Mode = Literal["online", "offline", "disabled", "shared"]

Level = Literal["INFO", "WARN", "ERROR"]

FLUSH_S = 1.0
"""After so many seconds a value is on the disk; a kill loses the values of the last seconds."""
FINISH_S = 12.0
"""Sending the end of a run may take so many seconds."""

ALERT_S = 3600.0
"""An alert is repeated after so many seconds at the earliest."""
MAX_TITLE = 63
"""wandb refuses alerts with longer titles."""

MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""What each value of $WANDB_MODE means."""


class Dashboard(ABC):
    """Where a run, or a part of it, is shown besides its folder."""

    is_shown: ClassVar[bool] = True
    """Whether anything is shown at all."""
    is_online: bool = False
    """Whether it is sent while it happens."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step."""

    @abstractmethod
    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Pictures of a step."""

    @abstractmethod
    def write(self, lines: str) -> None:
        """Lines that the job has printed."""

    @abstractmethod
    def keep(self, name: str, kind: str, files: Sequence[Path], root: Path, *, in_place: bool) -> None:
        """An artifact of files under `root`; `in_place` for files that stay as they are until they are sent."""

    @abstractmethod
    def alert(self, title: str, text: str, level: Level) -> None:
        """A message that wandb passes on to people, as they have set it up there."""

    @abstractmethod
    def finish(self, exit_code: int, preempted: bool) -> None:
        """The job has ended, this run may go on."""


class NoDashboard(Dashboard):
    """Shows nothing; what is shown without wandb is in the run's folder."""

    is_shown = False

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...
    def show(self, step: int, pictures: Mapping[str, Path]) -> None: ...
    def write(self, lines: str) -> None: ...
    def keep(self, name: str, kind: str, files: Sequence[Path], root: Path, *, in_place: bool) -> None: ...
    def alert(self, title: str, text: str, level: Level) -> None: ...
    def finish(self, exit_code: int, preempted: bool) -> None: ...


class Wandb(Dashboard):
    """A run of wandb, or a further segment of it."""

    def __init__(self, identity: Identity, mode: Mode, say: Say, stop: Callable[[], None]) -> None:
        """`stop` is called, in a thread of wandb's, when somebody presses Stop on the run's page."""
        self._say, self._stop = say, stop
        # Copies of artifacts lie in the run's folder, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(identity.folder / "wandb"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(identity.folder / "wandb"))
        import wandb

        self._wandb = wandb
        try:
            self._run = self._start(identity, mode)
        except Exception as error:
            # A further node can only add to a run that is online.
            if mode == "offline" or not _is_first(identity):
                raise
            say(f"wandb does not start online ({first_line(error)}). {_offline(identity.folder)}")
            wandb.teardown(1)  # in whose process the id would still be in use
            mode = "offline"
            self._run = self._start(identity, mode)
        self.is_online = mode != "offline"
        # wandb's own step can only grow, but a start goes back to its checkpoint, and pictures come later than numbers.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("loss/train", step_metric="step", summary="min,last")
        self._run.define_metric("speed/images_per_s", step_metric="step", summary="max,last")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        images = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({"step": step, **images})

    def write(self, lines: str) -> None:
        self._run.write_logs(public(lines))

    def keep(self, name: str, kind: str, files: Sequence[Path], root: Path, *, in_place: bool) -> None:
        artifact = self._wandb.Artifact(short(name), kind)
        for path in files:
            policy: Literal["immutable", "mutable"] = "immutable" if in_place else "mutable"
            # The cache is for artifacts that are read again; here it would hold a second copy of each checkpoint.
            artifact.add_file(str(path), name=str(path.relative_to(root)), skip_cache=True, policy=policy)
        self._run.log_artifact(artifact)

    def alert(self, title: str, text: str, level: Level) -> None:
        # The end stays, because it says what has happened.
        cut = title if len(title) <= MAX_TITLE else f"...{title[3 - MAX_TITLE :]}"
        self._run.alert(title=cut, text=public(text), level=level, wait_duration=ALERT_S)

    def finish(self, exit_code: int, preempted: bool) -> None:
        if preempted:
            self._run.mark_preempting()
        folder = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code)
            # wandb's process writes the last records only when it exits by itself.
            self._wandb.teardown(exit_code)
        except TimeoutError:
            self._say(f"wandb's server does not take everything; later: wandb sync {folder}")

    def _start(self, identity: Identity, mode: Mode) -> Any:
        # wandb itself would make the inner folders for their user alone, whatever the umask says.
        identity.folder.joinpath("wandb", "wandb", "logs").mkdir(parents=True, exist_ok=True)
        return self._wandb.init(
            dir=identity.folder,
            id=identity.run_id,
            project=identity.project,
            name=identity.name,
            group=identity.group,
            job_type=identity.job_type,
            tags=identity.tags,
            config=_hyphens(identity.config),
            mode=mode,
            resume="allow",
            settings=self._wandb.Settings(**settings_of(identity, self._stop)),
        )


def settings_of(identity: Identity, stop: Callable[[], None]) -> dict[str, Any]:
    """Returns how wandb is to behave; it refuses a setting that it does not know."""
    return {
        "silent": True,
        "console": "off",
        # Code and diffs stay in the run's folder: not everybody who sees the dashboard may see them.
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_save_requirements": False,
        # Otherwise each node would write the run's files on the server, and the first to end would end the run.
        "x_primary": _is_first(identity),
        "x_update_finish_state": _is_first(identity),
        # wandb copies its settings deeply: a function stays what it is, a method would have its whole object copied.
        "stop_fn": lambda: stop(),
        **_watching(identity.machine, identity.folder),
        "x_transaction_log_flush_interval": FLUSH_S,
        "init_timeout": FINISH_S,
        "finish_timeout": FINISH_S,
        "finish_timeout_raises": True,
    }


def _is_first(identity: Identity) -> bool:
    """Whether this process alone shows the run; otherwise it adds how busy another node is."""
    return identity.machine is None or identity.machine.is_first


def _watching(machine: Machine | None, folder: Path) -> dict[str, Any]:
    """Returns wandb's settings for what System shows: the processes and GPUs of the job, and the disk of its run."""
    if machine is None:
        return {"x_disable_stats": True}
    disk = next(path for path in (folder, *folder.parents) if path.is_mount())
    return {
        "x_stats_pid": machine.pid,
        "x_stats_track_process_tree": machine.tree,
        "x_stats_gpu_device_ids": _gpu_numbers(machine.gpus),
        "x_stats_disk_paths": [str(disk)],
        "x_label": machine.node if machine.nodes > 1 else None,
    }


def _gpu_numbers(uuids: Sequence[str]) -> list[int] | None:
    """Returns the numbers by which the driver knows the GPUs, None (for wandb: all) if it does not know each of them.

    torch's numbers are others where CUDA_VISIBLE_DEVICES hides some.
    """
    if not uuids:
        return [-1]  # no GPU has this number; an empty list would mean all
    try:
        command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in printed.splitlines()]
    found = [int(number) for number, uuid in rows if uuid.strip().removeprefix("GPU-") in uuids]
    return found if len(found) == len(uuids) else None


def open_dashboard(identity: Identity, asked: str, say: Say, stop: Callable[[], None] = lambda: None) -> Dashboard:
    """The dashboard that `tracking.mode` asks for; says so where it is offline without having been asked.

    The first process of several nodes shares the run with those that show how busy the other nodes are.
    """
    habit = os.environ.pop("WANDB_MODE", "")  # wandb itself does not start with a value that it does not know
    if asked == "auto":
        asked = MODES.get(habit, asked)
    if asked == "disabled":
        return NoDashboard()
    if wrong := wrong_variables():
        for name in wrong:
            del os.environ[name]
        # Not online: one of them may have named the server.
        say(f"wandb is offline: it does not take the value of {', '.join(wrong)}. {_offline(identity.folder)}")
        asked = "offline"
    if asked == "auto":
        problem = why_not_online(address())
        if problem is not None:
            say(f"wandb is offline: {problem}. {_offline(identity.folder)}")
        asked = "online" if problem is None else "offline"
    os.environ["WANDB_MODE"] = asked  # for a second attempt of this process
    mode = MODES[asked]
    shares = mode == "online" and identity.machine is not None and identity.machine.nodes > 1
    return Wandb(identity, "shared" if shares else mode, say, stop)


def _offline(folder: Path) -> str:
    return f"Later, where there is a network: python launch.py sync {folder}"


def _hyphens(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): _hyphens(value) if isinstance(value, dict) else value for key, value in tree.items()}


def first_line(error: Exception) -> str:
    """Returns the first line of what went wrong, to be put into a sentence."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
