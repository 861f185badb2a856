"""Checkpoints that appear whole or not at all, verified by hash when they are read."""

import errno
import json
import os
import secrets
import shutil
import threading
import time
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from diffusion.errors import UserError
from jobs.files import sha256, sync_file, sync_folder, write_atomically, write_json
from jobs.storage.records import held_out_losses, read_jsonl

if TYPE_CHECKING:
    from torch import Tensor

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
FILES, MANIFEST = (MODEL, EMA, OPTIMIZER), "manifest.json"
Named = int | Literal["best"]
"""How users name a checkpoint: by its step, or as the one with the lowest held-out loss."""
OPEN_FILES = Path("/proc/self/fd")
"""Where Linux has a path to each open file of this process."""
STILL_READ = (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOENT)
"""What NFS says of a folder in which somebody reads a deleted file, and of that file, then and a moment later."""
SLOW_S = 10.0
"""The user is told about a checkpoint that takes longer to write."""


class CorruptCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: copies in CPU memory, which training does not change any more.

    Tensors may be parts of one, and have channels last.
    """

    step: int
    model: "dict[str, Tensor]"
    ema: "dict[str, Tensor]"
    optimizer: dict[str, Any]


def weights_file(weights: Literal["ema", "model"]) -> str:
    """The file of a checkpoint that holds these weights."""
    return {"ema": EMA, "model": MODEL}[weights]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in the folder, newest first; none if there is no such folder.

    Raises OSError if it cannot be listed. A glob would find nothing then, and a run would begin anew.
    """
    try:
        names = [name.removeprefix("step-") for name in os.listdir(folder) if name.startswith("step-")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A copy that a person has put there, such as step-00000100-good, is none of ours.
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def verify(folder: Path, step: int) -> dict[str, Any]:
    """Checks size and hash of all files of a checkpoint; returns its manifest, or raises CorruptCheckpoint.

    Raises UserError if a file cannot be read: that says nothing of what is in it.
    """
    path = folder / folder_name(step)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["step"] != step or set(files) != set(FILES):
            raise CorruptCheckpoint(f"checkpoint {path} has a manifest of something else")
        for name, recorded in files.items():
            # The size first: it finds a file that was cut without reading gigabytes.
            if (path / name).stat().st_size != recorded["size"]:
                raise CorruptCheckpoint(f"checkpoint {path}: {name} has not the size that was written")
            if sha256(path / name) != recorded["sha256"]:
                raise CorruptCheckpoint(f"checkpoint {path}: {name} has changed since it was written")
    except OSError as error:
        # A missing file is damage for good. Any other error, of a network file system say, may be over in a minute: a
        # good checkpoint must not be set aside for that.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
        raise CorruptCheckpoint(f"checkpoint {path} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"checkpoint {path} is damaged: {error}") from error
    return dict(manifest)


def newest(folder: Path, say: Callable[[str], None]) -> int | None:
    """Returns the step of the newest good checkpoint, None if there is no checkpoint; warns of each bad one.

    Raises UserError if there are only bad ones, or if the folder is gone: to begin anew is for a person to decide.
    """
    if (manifest := _newest(folder, say)) is None:
        _check_there(folder)
        return None
    return int(manifest["step"])


def _newest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Returns the manifest of that checkpoint."""
    there = steps(folder)
    for step in there:
        try:
            return verify(folder, step)
        except CorruptCheckpoint as error:
            say(f"WARNING: {error}{'; falling back to the one before it' if step != there[-1] else ''}")
    if steps(folder):
        raise UserError(f"no checkpoint in {folder} is good; to begin anew, move them away")
    return None


def _check_there(folder: Path) -> None:
    """Raises UserError if a folder is gone in which checkpoints were saved: it may only be out of reach of this node.

    It may be a link into a file system that is not mounted here, for example.
    """
    if folder.is_dir() or not (saved := _valid(read_jsonl(_ledger_file(folder)))):
        return
    where = f"{folder} leads to {folder.readlink()}, which" if folder.is_symlink() else f"{folder}"
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    raise UserError(
        f"{where} is not there, though step {max(saved):,} was saved in it; to begin anew, make an empty folder there"
    ) from missing


def lowest(folder: Path) -> set[int]:
    """Returns the step of the checkpoint with the lowest held-out loss; an empty set if none was measured.

    The loss of a checkpoint is the last one that was measured at or before its step. Where several share it, the first
    of them counts, which is nearest to it.
    """
    losses = held_out_losses(folder.with_name("metrics.jsonl"))
    measured = sorted(losses)
    known = [(losses[measured[after - 1]], step) for step in steps(folder) if (after := bisect(measured, step))]
    return {min(known)[1]} if known else set()


def best(folder: Path) -> int:
    """Returns the step of the checkpoint with the lowest held-out loss; raises UserError if none was measured."""
    if not (found := lowest(folder)):
        raise UserError(
            f"--checkpoint best needs a checkpoint with a held-out loss, which {folder.parent} has not: train it with "
            "--train.held-out-every N, or name a step"
        )
    return found.pop()


def choose(folder: Path, named: Named | None, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """(step, manifest) of the good checkpoint that a user means, None meaning the newest; raises UserError."""
    if named is None:
        if (manifest := _newest(folder, say)) is None:
            raise UserError(f"{folder.parent} has no checkpoint yet: train it first")
        return int(manifest["step"]), manifest
    found = best(folder) if named == "best" else named
    if found not in steps(folder):
        held = ", ".join(map(str, steps(folder))) or "none"
        raise UserError(f"--checkpoint must be a step that {folder.parent} holds ({held}); got {found}")
    return found, verify(folder, found)


def load(folder: Path, step: int) -> Snapshot:
    """Reads a checkpoint that its caller has verified; no code in it can run."""
    # Here, because commands that only list checkpoints must not wait seconds for torch.
    import torch
    from safetensors.torch import load_file

    with _in_ascii(folder / folder_name(step)) as path:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        return Snapshot(step, load_file(path / MODEL), load_file(path / EMA), optimizer)


def ledger(folder: Path) -> dict[int, dict[str, str]]:
    """Returns the hash of each file of every checkpoint that was ever made, by step; the files may be gone.

    What had followed a step does not count any more once the run has gone back to that step, or has made it again with
    other bytes. Checkpoints that are older than the ledger itself are known as long as they are kept.
    """
    found = _valid(read_jsonl(_ledger_file(folder)))
    for step in set(steps(folder)) - found.keys():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or just being deleted
            manifest = json.loads((folder / folder_name(step) / MANIFEST).read_text())
            found[step] = {name: recorded["sha256"] for name, recorded in manifest["files"].items()}
    return dict(sorted(found.items()))


def _valid(lines: Iterable[dict[str, Any]]) -> dict[int, dict[str, str]]:
    """Returns the hashes of each step that lines of the ledger give, without those that the run has gone back on."""
    found: dict[int, dict[str, str]] = {}
    for line in lines:
        if "continued" in line:
            found = {step: files for step, files in found.items() if step <= line["continued"]}
            continue
        step, files = line["step"], line["sha256"]
        if found.get(step, files) != files:
            found = {other: known for other, known in found.items() if other < step}
        found[step] = files
    return found


def _ledger_file(folder: Path) -> Path:
    return folder.with_name("checkpoints.jsonl")


def _enter(folder: Path, step: int, files: dict[str, str]) -> bool:
    """Adds a line to the ledger, unless it has this one; returns whether it had other hashes for this step.

    The file is written anew, because a disk that is full might take half of a line.
    """
    lines = read_jsonl(_ledger_file(folder))
    known = [line["sha256"] for line in lines if line.get("step") == step]
    if _valid(lines).get(step) != files:
        _write_ledger(folder, [*lines, {"step": step, "sha256": files}])
    return bool(known) and known[-1] != files


def _write_ledger(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(_ledger_file(folder), "".join(json.dumps(line) + "\n" for line in lines))


def save(folder: Path, snapshot: Snapshot, may_write: Callable[[], None]) -> bool:
    """Writes a checkpoint aside, syncs it, renames it into place; `may_write` raises if another job has the run.

    Returns whether the ledger knows this step with other bytes.
    """
    import torch
    from safetensors.torch import save_file

    name = folder_name(snapshot.step)
    # The files keep their final names: torch.save writes the stem into the file.
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Each tensor alone: a file would hold all of what it is a part of. safetensors wants them contiguous, too.
        for tensors, file in ((snapshot.model, MODEL), (snapshot.ema, EMA)):
            alone = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
            with _words_of_a_full_disk():
                save_file(alone, temporary / file)
            del alone
        optimizer = _own(snapshot.optimizer)
        with _words_of_a_full_disk(), _in_ascii(temporary) as written:
            torch.save(optimizer, written / OPTIMIZER)
        for file in (MODEL, EMA):  # safetensors keeps its files to their user; the umask says who may read ours
            (temporary / file).chmod((temporary / OPTIMIZER).stat().st_mode)
        recorded = {}
        for file in FILES:
            sync_file(temporary / file)
            recorded[file] = {"size": (temporary / file).stat().st_size, "sha256": sha256(temporary / file)}
        # Last: a manifest means that all files are complete. It syncs the folder, too, and so the names of all four.
        write_json(temporary / MANIFEST, {"step": snapshot.step, "files": recorded})
        may_write()
        # Before the checkpoint appears, so that a kill between the two leaves none out.
        is_other = _enter(folder, snapshot.step, {file: str(facts["sha256"]) for file, facts in recorded.items()})
        if (folder / name).exists():  # a run that went back to an older checkpoint comes by again
            _doom(folder / name)
        temporary.rename(folder / name)
        # Only now may older checkpoints be deleted: a power cut could undo a rename that is not on the disk.
        sync_folder(folder)
        return is_other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _in_ascii(folder: Path) -> Iterator[Path]:
    """Gives a path of ASCII to the folder.

    torch.save writes other bytes to any other path: its archive has the name `archive` then, and not that of the file.
    safetensors reads from none that is no text.
    """
    if str(folder).isascii():
        yield folder
    elif OPEN_FILES.is_dir():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            yield OPEN_FILES / str(descriptor)
        finally:
            os.close(descriptor)
    else:  # macOS; not the way of all, because on a cluster's node /tmp may be full
        with TemporaryDirectory() as aside:
            link = Path(aside) / "checkpoint"
            link.symlink_to(folder.absolute(), target_is_directory=True)
            yield link


@contextmanager
def _words_of_a_full_disk() -> Iterator[None]:
    """While entered, what safetensors and torch say of a disk that takes no more is an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"the disk takes no more ({str(error).splitlines()[0]})") from error


def _own(state: Any) -> Any:
    """Returns an optimizer's state with tensors that are no part of others."""
    import torch

    if isinstance(state, dict):
        return {name: _own(value) for name, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def prune(folder: Path, keep: int, needed: Collection[int] = ()) -> None:
    """Deletes all but the newest `keep` checkpoints and those of the steps that are `needed`, and what was replaced.

    On NFS a folder stays as long as somebody here reads a file that was in it. What else cannot be deleted is raised,
    after all the rest is gone.
    """
    for step in steps(folder)[keep:]:
        if step not in needed:
            _doom(folder / folder_name(step))
    errors: list[BaseException] = []
    for doomed in folder.glob(".step-*.old"):
        shutil.rmtree(doomed, onerror=lambda function, path, raised: errors.append(raised[1]))
    for error in errors:
        if not (isinstance(error, OSError) and error.errno in STILL_READ):
            raise error


def firsts(found: Iterable[int], every: int) -> set[int]:
    """Returns the first of the steps at or after each multiple of `every`, none if that is 0.

    At or after, because a checkpoint may be late when the disk is slow, and a stopped run saves at any step.
    """
    first: dict[int, int] = {}
    for step in sorted(found):
        first.setdefault(step // every if every else 0, step)
    return {step for multiple, step in first.items() if multiple > 0}


def clean(folder: Path) -> None:
    """Deletes what dead writers have left half-written; only the run's owner may call it, before it writes."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, newer_than: int) -> None:
    """Renames the checkpoints that are newer than the good one from which training continues: they are corrupt.

    From now on the ledger counts none of them either: the next steps may be made with other settings.
    """
    lines = read_jsonl(_ledger_file(folder))
    if any(step > newer_than for step in _valid(lines)):
        _write_ledger(folder, [*lines, {"continued": newer_than}])
    for step in steps(folder):
        if step > newer_than:
            corrupt = folder / f"corrupt-{folder_name(step)}"
            # One that was set aside earlier: a folder cannot be renamed over one that is not empty.
            shutil.rmtree(corrupt, ignore_errors=True)
            (folder / folder_name(step)).rename(corrupt)


def _doom(path: Path) -> None:
    """Renames a checkpoint that is to be deleted, so that no reader finds half of one under its name."""
    # Another one of this step may still be there, on NFS.
    path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.old"))


class Writer:
    """Writes checkpoints in a thread, one at a time, so that training does not wait for the disk."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        newest: int,
        may_write: Callable[[], None],
        say: Callable[[str], None],
        needed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.newest = newest
        """The step of the newest checkpoint that is safely on the disk, 0 before the first."""
        self.waited_s = 0.0
        """Seconds that training has waited for the disk."""
        self._folder, self._keep = folder, keep
        self._may_write, self._say, self._needed = may_write, say, needed
        self._thread: threading.Thread | None = None
        self._begun, self._told = 0.0, False
        self._error: BaseException | None = None
        self._warnings: list[str] = []

    def is_busy(self, say: Callable[[str], None]) -> bool:
        """Whether the last checkpoint is still being written; says so once if that takes long.

        A file system may hang for minutes. Training can go on meanwhile, and save later.
        """
        if self._thread is None or not self._thread.is_alive():
            return False
        seconds = time.monotonic() - self._begun
        if seconds >= SLOW_S and not self._told:
            self._told = True
            say(f"WARNING: a checkpoint is not written after {seconds:.0f} s; training goes on, the next one waits")
        return True

    def write(self, snapshot: Snapshot) -> None:
        """Starts writing, once the previous checkpoint is written."""
        self.wait()
        self._begun, self._told = time.monotonic(), False
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint is written.

        If the disk is full, this warns and raises nothing: the next checkpoint may find room.
        """
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited_s += time.perf_counter() - started
        while self._warnings:
            self._say(self._warnings.pop(0))
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self._say(
                f"WARNING: a checkpoint could not be written: {error}; the last good one is of step {self.newest}"
            )
        elif error is not None:
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            if save(self._folder, snapshot, self._may_write):
                made_again = f"step {snapshot.step} was made again"
                self._warnings.append(f"WARNING: {made_again} and is not what checkpoints.jsonl says: other bytes")
            # Before older ones are deleted: if that fails, this one is safe all the same.
            self.newest = snapshot.step
            try:
                prune(self._folder, self._keep, self._needed())
            except OSError as error:
                self._warnings.append(f"WARNING: older checkpoints could not be deleted: {error}")
        except BaseException as error:  # raised in the training thread by wait()
            self._error = error
