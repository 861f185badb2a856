"""Files and folders that appear whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; the file there is synced to the disk and renamed, so no reader ever sees half of it.

    After an exception `path` is what it was before.
    """
    # In the same folder, because a rename is atomic within one file system only. The dot hides it from readers.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            yield temporary
            # Bytes before the name: otherwise a power cut may leave a name of bytes that never reached the disk.
            sync_file(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill; it becomes `path` with all its files, or is removed after an exception.

    If another process has made `path` meanwhile, with something in it, that one stays.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed: in a container they have the same ids
    try:
        with named(path):
            made.mkdir()
            yield made
            os.sync()  # there may be very many files
        try:
            made.rename(path)
        except OSError as error:
            # POSIX allows either word for a folder that has something in it.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors meanwhile name the file that is written: of a full disk the system names none, or what is copied to it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or error.filename2 is not None):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all; what is no text in a path becomes as in \\udcff."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the folder's entries are on the disk, and so the renames in it.

    Some network file systems cannot do that for a folder, and say EINVAL.
    """
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def now_in(folder: Path) -> float:
    """The time by which the disk of this folder gives files theirs, which the clock of a machine may differ from.

    Seconds since 1970. A file without a name is made for that.
    """
    with TemporaryFile(dir=folder) as new:
        return os.fstat(new.fileno()).st_mtime


def sha256(path: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
