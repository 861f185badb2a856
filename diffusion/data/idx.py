"""Data sets in the files of MNIST's format: fetched once, checked by their sha256, read as uint8 arrays.

The launcher fetches (`fetch`), because compute nodes often have no network; the job only checks (`require`) and reads.
The folder is laid out as torchvision.datasets expects it. Importing this costs neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from diffusion.data.download import DownloadError, from_web
from diffusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split = Literal["train", "test"]
_PREFIX = {"train": "train", "test": "t10k"}
LAST_RESORT_S = 180.0
"""Seconds that the last resort may take."""


class DataUnavailable(UserError):
    """No source delivered the files."""


class WrongData(UserError):
    """A file that is there is not the data set's own."""


class Source(NamedTuple):
    """Somewhere else to get the files from than a mirror."""

    title: str
    fetch: Callable[[float], dict[str, bytes]]
    """Returns the files by name within so many seconds; raises DownloadError if it cannot."""


@dataclass(frozen=True, kw_only=True)
class IdxDataset:
    """Describes a data set of four IDX files: images and labels, for training and for tests."""

    name: str
    """This is also its folder."""
    variable: str
    """The environment variable that names the folder in which that lies, unless a setting does."""
    height: int
    width: int
    count: Mapping[Split, int]
    """Number of images."""
    sha256: Mapping[str, str]
    """The four files, unpacked."""
    mirrors: tuple[str, ...]
    """Addresses below which the files lie, each with .gz at its end."""
    last_resort: Source | None = None
    """Asked when all mirrors have failed."""

    channels: ClassVar[int] = 1
    """Files with three dimensions have no colours."""

    def default_root(self) -> str:
        return os.environ.get(self.variable, "data")

    def raw_folder(self, root: Path) -> Path:
        return root / self.name / "raw"

    def size(self, name: str) -> int:
        """Bytes of one of the files: a header of four bytes for each dimension and four more, then the content."""
        count = next(self.count[split] for split, prefix in _PREFIX.items() if name.startswith(prefix))  # type: ignore[index]
        return 8 + count if "idx1" in name else 16 + count * self.height * self.width

    def num_test(self, root: Path) -> int:
        return self.count["test"]

    def digest(self) -> str:
        """Returns a hash of the hashes of all files."""
        return hashlib.sha256(json.dumps(dict(self.sha256), sort_keys=True).encode()).hexdigest()

    def read_images(self, root: Path, split: Split) -> NDArray[np.uint8]:
        """Returns the images [n, height, width, 1], 0 is background; call `require` once before."""
        import numpy as np

        path = self.raw_folder(root) / f"{_PREFIX[split]}-images-idx3-ubyte"
        return np.fromfile(path, np.uint8, offset=16).reshape(-1, self.height, self.width, self.channels)

    def read_labels(self, root: Path, split: Split) -> NDArray[np.uint8]:
        """Returns the classes [n], in the order of `read_images`."""
        import numpy as np

        return np.fromfile(self.raw_folder(root) / f"{_PREFIX[split]}-labels-idx1-ubyte", np.uint8, offset=8)

    def require(self, root: Path) -> None:
        """Raises UserError unless all four files are there and right."""
        if missing := self._missing(root):
            raise UserError(
                f"{self.name} is not complete in {self.raw_folder(root)}: {', '.join(missing)} missing; "
                "start the job with launch.py, which fetches what is missing before it submits"
            )

    def fetch(
        self,
        root: Path,
        *,
        mirrors: Sequence[str] | None = None,
        patience_s: float = 5.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Puts the files that are missing into their folder; returns at once if there are none.

        Asks the mirrors in turn, each until its first failure, then the last resort. UserError for a file that is
        there and wrong (it is not replaced) or a folder that cannot be written; DataUnavailable if no source delivers.
        """
        if not self._missing(root):
            return
        asked = self.mirrors if mirrors is None else mirrors
        sources = [(mirror, partial(self._from_mirror, mirror, patience_s)) for mirror in asked]
        if self.last_resort is not None:
            sources.append((self.last_resort.title, partial(_from, self.last_resort)))
        folder = self.raw_folder(root)
        failures = []
        try:
            with _alone_in(folder, self.name, say):
                # Looked up again: another process may have fetched them while this one waited.
                missing = self._missing(root)
                for title, source in sources if missing else ():
                    say(f"fetching {self.name} to {folder}: {title}")
                    try:
                        for name, content in source(tuple(missing)):
                            if (sha256 := hashlib.sha256(content).hexdigest()) != self.sha256[name]:
                                raise DownloadError(f"{name} is wrong: sha256 {sha256}")
                            _write(folder / name, content)
                            missing.remove(name)
                        return
                    except DownloadError as error:
                        failures.append(f"{title} ({error})")
                        say(f"  failed: {error}")
        except OSError as error:
            raise UserError(f"{self.name} cannot be written to {folder}: {error.strerror}") from error
        if missing:
            raise DataUnavailable(
                f"{self.name} could not be fetched from {', '.join(failures) or 'nowhere'}; "
                f"put {', '.join(missing)} (unpacked) into {folder} by hand, for example from a machine with a network"
            )

    def _missing(self, root: Path) -> list[str]:
        """Returns the names of files that are not there; raises WrongData for one that is there and wrong."""
        missing, wrong = [], []
        for name in self.sha256:
            path = self.raw_folder(root) / name
            try:
                content = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                missing.append(name)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            else:
                if len(content) != self.size(name):
                    wrong.append(f"{path} ({len(content)} bytes instead of {self.size(name)})")
                elif (sha256 := hashlib.sha256(content).hexdigest()) != self.sha256[name]:
                    wrong.append(f"{path} (sha256 {sha256} instead of {self.sha256[name]})")
        if wrong:
            raise WrongData(
                f"not {self.name}'s own file: {', '.join(wrong)}; delete it, and launch.py fetches it again"
            )
        return missing

    def _from_mirror(self, mirror: str, patience_s: float, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            size = self.size(name)
            packed = from_web(f"{mirror}{name}.gz", max_bytes=size, patience_s=patience_s)
            try:
                # One byte more than there should be is enough to be wrong.
                content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(size + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise DownloadError(f"{name}.gz is wrong: {error}") from error
            yield name, content


def _from(source: Source, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    files = source.fetch(LAST_RESORT_S)
    for name in names:
        yield name, files[name]


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)  # a process that failed may have removed it
    # Random, not the process id: two machines with one file system may have the same.
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
def _alone_in(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
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
                say(f"another process is fetching {name} to {folder}: waiting for it")
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
