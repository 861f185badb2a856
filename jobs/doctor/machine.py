"""Examines this machine for faults that would cost a run later."""

import fcntl
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from diffusion.data.idx import WrongData
from diffusion.data.mnist import MNIST
from diffusion.errors import UserError
from jobs.storage import faults, provenance
from jobs.storage.ownership import LOCKS
from jobs.tracking.dashboard import MODES
from jobs.tracking.server import address, public, why_not_online, wrong_variables

LEAST_FREE_GB, COMFORTABLE_GB = 1, 10
"""Below the first, disk space is a problem, below the second a warning: a run of mnist takes about 0.5 GB."""
LOCAL_FILE_SYSTEMS = {"ext4", "ext3", "xfs", "btrfs", "overlay", "tmpfs", "zfs"}


class Finding(NamedTuple):
    """What was found, why it matters, and what helps."""

    level: Literal["ok", "warning", "problem"]
    what: str
    why: str = ""
    cure: str = ""


def examine(runs_dir: Path, data_root: Path, is_shared: bool) -> Iterator[Finding]:
    """Yields findings about this machine; if `is_shared`, other machines must see the folder of all runs, too."""
    yield from _software()
    yield from _gpus()
    yield _mnist(data_root)
    yield from _folder(runs_dir, is_shared)
    yield from _left_out(runs_dir)
    yield _wandb()


def _software() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} in {sys.prefix}")
    versions = provenance.versions()
    if missing := [package for package, version in versions.items() if version is None]:
        yield Finding("problem", f"not installed: {', '.join(missing)}", "jobs import them", "pip install --editable .")
    yield Finding("ok", ", ".join(f"{package} {version}" for package, version in versions.items() if version))


def _gpus() -> Iterator[Finding]:
    import torch  # takes seconds, but who wants to know about GPUs has to ask it

    from jobs.runtime.numerics import computes_bf16, gpu_computes_bf16

    count = torch.cuda.device_count()
    if count == 0 and shutil.which("nvidia-smi") is not None:
        yield Finding(
            "problem",
            f"there is nvidia-smi, but torch {torch.__version__} finds no GPU",
            "it would train on the CPU",
            "install a torch for this driver: https://pytorch.org/get-started; compare `nvidia-smi` and torch's CUDA",
        )
    elif count == 0:
        yield Finding("ok", f"no GPU here; the CPU computes in {'bf16' if computes_bf16() else 'fp32'}")
    for gpu in range(count):
        precision = "bf16" if gpu_computes_bf16(gpu) else "fp32"
        yield Finding("ok", f"GPU {gpu}: {torch.cuda.get_device_name(gpu)}, {precision}")


def _mnist(root: Path) -> Finding:
    try:
        MNIST.require(root)
    except WrongData as error:  # a UserError as well, so it must come first
        return Finding("problem", str(error), "no run of mnist starts with other data", "delete it")
    except UserError:
        why = "compute nodes often have no network to fetch it"
        return Finding(
            "warning", f"no MNIST in {root}", why, "nothing to do where `train mnist` can fetch it from here"
        )
    return Finding("ok", f"MNIST in {root} is complete and right")


def _folder(runs_dir: Path, is_shared: bool) -> Iterator[Finding]:
    """Tries writing, locking and room in the folder of all runs, or in the place where it will be made."""
    # The folder itself is made by the first run.
    there = next(path for path in (runs_dir.absolute(), *runs_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        yield Finding(
            "problem", f"{there} cannot be written: {error.strerror}", "runs are kept in it", "--runs-dir DIR"
        )
        return
    yield _locks(there)
    free_gb = shutil.disk_usage(there).free / 1e9
    level: Literal["ok", "warning", "problem"] = "ok"
    if free_gb < COMFORTABLE_GB:
        level = "warning" if free_gb >= LEAST_FREE_GB else "problem"
    yield Finding(
        level,
        f"{free_gb:,.1f} GB are free in {there}",
        "" if level == "ok" else "a run of mnist takes 0.5 GB, a million samples of it 1.6 GB",
        "" if level == "ok" else "make room, or --runs-dir DIR",
    )
    kind = file_system(there)
    if is_shared and kind in LOCAL_FILE_SYSTEMS:
        yield Finding(
            "warning",
            f"{there} lies on {kind}, a file system that other machines may not see",
            "a job on another node would not find its run",
            "--runs-dir on a shared file system; doctor --submit tries it out",
        )


def _locks(folder: Path) -> Finding:
    """Tries whether a lock keeps another process out; two descriptors in one process are enough for that."""
    why = "two trainings of one run at once would write over each other"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as first, open(first.name) as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Shared, because this descriptor only reads: NFS would refuse it an exclusive lock, whoever holds another.
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("ok", f"{folder} can be written and locked")
        except OSError as error:
            return Finding("problem", f"files in {folder} cannot be locked: {error.strerror}", why, LOCKS)
    return Finding("problem", f"locks in {folder} keep nobody out", why, "another file system for --runs-dir")


def file_system(folder: Path) -> str:
    """Returns the type of the file system that a folder lies on, such as nfs4."""
    kinds = {}
    # Not splitlines(): a carriage return in a path is not escaped there.
    for line in Path("/proc/mounts").read_bytes().removesuffix(b"\n").split(b"\n"):
        _, mount, kind, *_ = line.split(b" ")
        # Blanks, among others, are written as \040 there (fstab(5)). Mounts come in order, and a later one hides an
        # earlier one at the same place.
        place = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), mount)
        kinds[Path(os.fsdecode(place))] = kind.decode()
    folder = folder.resolve()
    return next((kinds[path] for path in (folder, *folder.parents) if path in kinds), "unknown")


def _left_out(runs_dir: Path) -> Iterator[Finding]:
    """Names the nodes on which runs have died again and again."""
    reasons: dict[str, list[str]] = {}
    patterns = (f"[!.]*/[!.]*/{faults.FILE}", f"[!.]*/[!.]*/samples/[!.]*/{faults.FILE}")
    for path in sorted(path for pattern in patterns for path in runs_dir.glob(pattern)):
        with suppress(OSError, TypeError):  # somebody else's, or of a later version
            for node, fault in faults.bad_nodes(path.parent).items():
                run = path.parent.relative_to(runs_dir)
                reasons.setdefault(node, []).append(f"{run} ({fault.time[:10]}: {fault.cause})")
    for node, runs in sorted(reasons.items()):
        yield Finding(
            "warning",
            f"{node} was left out by {', '.join(runs)}",
            "each of these has died there twice without progress, and others may",
            f"tell the cluster's support; until then --slurm.exclude {node}, or the profile's exclude",
        )


def _wandb() -> Finding:
    habit = os.environ.get("WANDB_MODE", "")
    mode = MODES.get(habit)
    told = f"wandb is {mode}, as WANDB_MODE={habit} says; its server was not asked"
    if mode == "disabled":
        return Finding("ok", told)
    try:
        if wrong := wrong_variables():
            problem, cure = f"it does not take the value of {', '.join(wrong)}", "correct or unset it"
        elif mode == "offline":
            return Finding("ok", f"{told}; `python launch.py sync RUN` sends the files")
        else:
            server = address()
            if (asked := why_not_online(server)) is None:
                return Finding("ok", f"{public(server)} answers and accepts the key")
            problem, cure = asked, "`wandb login` if there is no key"
    except ImportError as error:
        return Finding("warning", f"wandb is not there: {error}", "nothing is tracked", "pip install --editable .")
    cure += "; `python launch.py sync RUN` sends the files later"
    return Finding("warning", f"wandb is offline: {problem}", "curves are kept in the run's folder alone", cure)
