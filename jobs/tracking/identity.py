"""What a run, its samples and its evaluations are called in wandb, and what of a machine belongs to them."""

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.storage.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The processes and GPUs of a job on one node, whose use of it wandb's section System shows."""

    pid: int
    tree: bool
    """Whether all processes that `pid` has started belong to the job, not `pid` alone."""
    gpus: Sequence[str]
    """Their UUIDs."""
    node: str
    nodes: int
    """Number of nodes of the job."""
    is_first: bool
    """Whether the process that writes the run's files is on this node."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is called in wandb, and what it is filed under."""

    folder: Path
    """wandb's own files go to FOLDER/wandb."""
    run_id: str
    project: str
    name: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    """Settings and facts; wandb shows them under the names of the command line."""
    machine: Machine | None = None
    """What is shown under System; None is nothing."""


FACTS = ("device", "gpu", "nodes", "precision", "compile", "processes", "threads", "parameters", "torch")
"""Facts of a training's last start by which people filter runs."""
POSITION = ".tracking.json"
"""The file below a run's folder that says how far its follower has got."""
MAX_NAME = 128
"""wandb refuses longer names."""


def short(name: str) -> str:
    """The name as wandb and file systems take it: of one that is too long the beginning, and a hash of the whole."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def ensure_id(run: RunFolder) -> None:
    """Gives the run an id in wandb if launch.json has none: it was lost, or is older than tracking."""
    if "wandb_id" not in run.read_launch():
        run.update_launch(wandb_id=secrets.token_hex(4))
        (run.path / POSITION).unlink(missing_ok=True)  # how far the run with another id had got


def of_training(run: RunFolder, start: Mapping[str, Any], machine: Machine) -> Identity:
    """Returns the identity of a training; `start` is the line of timing.jsonl that its present start has written."""
    experiment, settings = run.read_experiment()
    launch = run.read_launch()
    facts = {name: start[name] for name in FACTS if name in start}
    about = {"experiment": experiment, "git_commit": launch.get("git_commit"), "job_ids": launch.get("job_ids", [])}
    return Identity(
        **_common(run),
        run_id=launch["wandb_id"],
        name=short(run.label),
        job_type="train",
        tags=[experiment, str(start.get("device", ""))],
        config={**dataclasses.asdict(settings), **about, **facts},
        machine=machine,
    )


def of_part(run: RunFolder, part: str, job_type: str, config: Mapping[str, Any]) -> Identity:
    """Returns the identity of a part of a run, such as a set of samples; wandb shows it in the run's group."""
    # Made of the part's name, so that a sampling that is continued goes on with the same run in wandb.
    run_id = f"{run.read_launch()['wandb_id']}-{hashlib.sha256(part.encode()).hexdigest()[:6]}"
    name, tags = short(f"{run.label}/{part}"), [run.read_experiment()[0]]
    return Identity(**_common(run), run_id=run_id, name=name, job_type=job_type, tags=tags, config=config)


def _common(run: RunFolder) -> dict[str, Any]:
    """What a training shares with its samples and evaluations; their group is the sweep, or the training itself."""
    group = short(run.read_launch().get("sweep") or run.label)
    return {"folder": run.path, "project": run.read_experiment()[1].tracking.project, "group": group}
