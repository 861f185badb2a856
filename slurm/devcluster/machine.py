"""What a cluster needs of this machine and changes on it: root, packages, a folder, a line in /etc/hosts.

The line is there because torch's store looks up the first node's name. Each cluster has its own, marked with its
folder, so clusters with equal node names do not disturb one another.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

APT_PACKAGES = ("slurm-wlm", "slurm-client", "slurmdbd", "mariadb-server", "munge")
"""What `apt-get install` needs on Debian and Ubuntu."""

HOSTS = Path("/etc/hosts")
MARKER = "devcluster.json"

# A Unix socket's path has at most 107 bytes; the longest below the folder is a job step's.
LONGEST_DIR = 60


class Unavailable(RuntimeError):
    """This user or machine cannot run a dev cluster; the message says what is missing."""


def check_root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("the dev cluster needs root, for its daemons and the GPUs' device files; try sudo")


def check_packages(accounting: bool) -> None:
    programs = ["munged", "slurmctld", "slurmd", "sbatch"]
    if accounting:
        programs += ["slurmdbd", "mariadbd", "mariadb-install-db"]
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        command = " ".join(["apt-get install --no-install-recommends", *APT_PACKAGES])
        raise Unavailable(f"not found: {', '.join(missing)}; get all that is needed with: {command}")


def check_folder(dir: Path) -> None:
    """Raises ValueError unless a cluster may live, and be deleted, in the folder."""
    if len(str(dir)) > LONGEST_DIR:
        raise ValueError(f"the folder's path must have at most {LONGEST_DIR} characters; got {dir}")
    if dir.exists() and not (dir / MARKER).exists() and any(dir.iterdir()):
        raise ValueError(f"the folder must be new, empty or a dev cluster's; got {dir}")


@contextmanager
def machine_lock() -> Iterator[None]:
    """Lets one cluster at a time start or stop on this machine: that is when ports are chosen and hosts edited."""
    with HOSTS.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_hosts(dir: Path, names: list[str]) -> None:
    """Makes the names resolve to this machine; ValueError if one of them belongs to another."""
    with HOSTS.open("a+b") as file:
        separator = "" if HOSTS.read_bytes().endswith(b"\n") else "\n"
        file.write(f"{separator}127.0.0.1 {' '.join(names)} {_mark(dir)}\n".encode())
    for name in names:
        if (address := socket.gethostbyname(name)) != "127.0.0.1":
            raise ValueError(f"node names must be free, but {name} is {address}; choose another node_prefix")


def remove_hosts(dir: Path) -> None:
    lines = HOSTS.read_bytes().splitlines(keepends=True)
    content = b"".join(line for line in lines if not line.endswith(f" {_mark(dir)}\n".encode()))
    # In place, since containers mount this file and a rename fails; what precedes our line never changes.
    with HOSTS.open("r+b") as file:
        file.write(content)
        file.truncate()


def _mark(dir: Path) -> str:
    return f"# slurm.devcluster {dir}"
