"""What the long repetitions do to a run's disk and processes, for a while."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.launching import wait_until


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Makes the folder a disk of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(filler: Path) -> None:
    """Fills a disk with this file."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def fill(disk: Path, seconds: float) -> None:
    """Fills the disk, and makes room again."""
    fill_up(disk / "filler")
    time.sleep(seconds)
    (disk / "filler").unlink()


def block(folder: Path, seconds: float) -> None:
    """Lets nobody write into the folder, which can still be read, and then everybody again."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        # It is busy while somebody writes a file in it.
        wait_until(lambda: subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=False).returncode == 0)
        time.sleep(seconds)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
