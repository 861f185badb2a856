"""What an audit computes again: stretches of a run, from one kept checkpoint to the next. Imports no torch."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusion.errors import OutsideError, UserError, reason
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.experiment_json import in_parts
from jobs.storage import checkpoints
from jobs.storage.checkpoints import CorruptCheckpoint, folder_name
from jobs.storage.records import append, read_jsonl, starts
from jobs.storage.run_folder import RunFolder

AS_STARTED = ("steps", "grad_shards", "precision", "compile")
"""Settings that bytes depend on and that each start records, because the next one may have others."""


@dataclass(frozen=True)
class Part:
    """The steps up to `stop` that one start of the run has trained."""

    stop: int
    config: ExperimentConfig
    facts: dict[str, Any]
    """Facts about the machine, as the start has recorded them."""
    is_known: bool
    """Whether the settings are those of that start; versions before audits did not record them."""


@dataclass(frozen=True)
class Stretch:
    """The steps from a kept checkpoint, or from the beginning, to a later checkpoint, which may be gone."""

    start: int
    stop: int
    hashes: dict[int, dict[str, str]]
    """The hashes in the run's ledger of the checkpoints in between, by step and file."""
    parts: tuple[Part, ...]
    again: Path
    """A folder for what is computed now; its files are called as in a run."""

    def computed(self) -> dict[int, dict[str, str]]:
        """Returns the hashes that have been computed so far of those checkpoints."""
        found = checkpoints.ledger(RunFolder(self.again).checkpoints)
        return {step: files for step, files in found.items() if step in self.hashes}

    def different(self) -> int | None:
        """Returns the first step whose checkpoint has other bytes than the run's, None if there is none so far."""
        return next((step for step, files in self.computed().items() if files != self.hashes[step]), None)

    def is_done(self) -> bool:
        return self.stop in self.computed() or self.different() is not None


@dataclass(frozen=True)
class Audit:
    """Stretches of a run that follow one another."""

    run: Path
    folder: Path
    stretches: tuple[Stretch, ...]

    @property
    def most_processes(self) -> int:
        """More than these would cut the batch more finely than the run did."""
        return min(part.config.train.grad_shards or 1 for stretch in self.stretches for part in stretch.parts)

    def begin(self, at_once: int) -> None:
        """Makes the folder, with copies of the checkpoints from which stretches start: the run may delete its own.

        Raises UserError if the disk has no room for an audit that computes so many stretches at once, and
        FileExistsError if another audit has the folder.
        """
        self._check_disk(at_once)
        # Before the `try`: a folder that is there already is another audit's, and must not be removed.
        self.folder.mkdir(parents=True)
        ledger = checkpoints.ledger(RunFolder(self.run).checkpoints)
        try:
            for stretch in self.stretches:
                RunFolder(stretch.again).checkpoints.mkdir(parents=True)
                if stretch.start > 0 and self._copied(stretch) != ledger[stretch.start]:
                    path = RunFolder(self.run).checkpoints / folder_name(stretch.start)
                    raise OutsideError(f"{path} has other bytes than checkpoints.jsonl says")
        except BaseException:  # Ctrl-C, too
            shutil.rmtree(self.folder)
            raise

    def _check_disk(self, at_once: int) -> None:
        """A stretch holds one checkpoint, and one more while it is computed: the next one, before the last is deleted.

        A checkpoint is counted as the largest that the run holds.
        """
        files = RunFolder(self.run).checkpoints.glob("step-*/*")
        sizes: dict[Path, int] = {}
        for file in files:
            with suppress(FileNotFoundError):  # the run may be running
                sizes[file.parent] = sizes.get(file.parent, 0) + file.stat().st_size
        needed = (len(self.stretches) + at_once) * max(sizes.values(), default=0)
        there = next(path for path in self.folder.parents if path.is_dir())
        if needed > (free := shutil.disk_usage(there).free):
            raise UserError(
                f"the checkpoints of this audit need {needed / 1e9:.2f} GB of disk; {free / 1e9:.2f} GB are free in "
                f"{there}"
            )

    def _copied(self, stretch: Stretch) -> dict[str, str]:
        """Copies the checkpoint that the stretch starts from; returns the hash of each file."""
        copies, name = RunFolder(stretch.again).checkpoints, folder_name(stretch.start)
        source = RunFolder(self.run).checkpoints / name
        try:
            (copies / name).mkdir()
            for file in (*checkpoints.FILES, checkpoints.MANIFEST):
                shutil.copyfile(source / file, copies / name / file)
            files = checkpoints.verify(copies, stretch.start)["files"]
        except (FileNotFoundError, CorruptCheckpoint):
            raise OutsideError(f"the run has just deleted {source}; start the audit again") from None
        except OSError as error:
            raise OutsideError(f"{source} cannot be copied: {reason(error)}") from error
        return {file: facts["sha256"] for file, facts in files.items()}

    def stop(self) -> None:
        """Deletes the checkpoints of an audit that nobody goes on with, but for those that differ."""
        for stretch in self.stretches:
            if stretch.different() is None:
                shutil.rmtree(RunFolder(stretch.again).checkpoints, ignore_errors=True)

    def add_job(self, job_id: str) -> None:
        """Remembers a Slurm job that works on the audit."""
        append(self.folder / "jobs.jsonl", {"job_id": job_id})

    def job_ids(self) -> list[str]:
        return [line["job_id"] for line in read_jsonl(self.folder / "jobs.jsonl")]


def plan(
    run: RunFolder, config: ExperimentConfig, start: int, stop: int | None, folder: Path, say: Callable[[str], None]
) -> Audit:
    """Cuts the steps from `start` to `stop`, None meaning the last checkpoint, at the checkpoints that are kept.

    Raises UserError if there is no checkpoint of these steps.
    """
    ledger = checkpoints.ledger(run.checkpoints)
    if not ledger:
        raise UserError(f"{run} has no checkpoint yet: train it first")
    stop = max(ledger) if stop is None else stop
    if stop not in ledger:
        near = [max((step for step in ledger if step < stop), default=None), *[s for s in ledger if s > stop][:1]]
        known = " and ".join(str(step) for step in near if step is not None)
        raise UserError(f"--to must be a step of which {run} has made a checkpoint, such as {known}; got {stop}")
    kept = [0, *sorted(checkpoints.steps(run.checkpoints))]
    if start not in kept:
        raise UserError(f"--from must be a step that {run} holds ({', '.join(map(str, kept))}); got {start}")
    if start >= stop:
        raise UserError(f"--from must be less than --to; got {start} and {stop}")
    cuts = [*(step for step in kept if start <= step < stop and _is_good(run, step, say)), stop]
    if cuts[0] != start:
        raise UserError(f"the checkpoint of --from {start} is damaged")
    # A run without a record of its starts counts as one start, with today's settings.
    trained = _lasting_starts(run) or [{}]

    def stretch(first: int, last: int) -> Stretch:
        hashes = {step: files for step, files in ledger.items() if first < step <= last}
        return Stretch(first, last, hashes, _parts(trained, config, first, last), folder / f"from-{first:08d}")

    return Audit(run.path, folder, tuple(stretch(first, last) for first, last in pairwise(cuts)))


def _is_good(run: RunFolder, step: int, say: Callable[[str], None]) -> bool:
    try:
        if step:
            checkpoints.verify(run.checkpoints, step)
    except CorruptCheckpoint as error:
        say(f"WARNING: {error}; nothing starts from there")
        return False
    return True


def _lasting_starts(run: RunFolder) -> list[dict[str, Any]]:
    """Returns those starts of the run, in order, whose steps have not been done again by a later one."""
    found: list[dict[str, Any]] = []
    for start in starts(read_jsonl(run.timing)):
        found = [before for before in found if before["step"] < start["step"]]
        older = {"grad_shards": start["processes"]} if "processes" in start else {}  # as these cut the batch
        found.append({**older, **start})
    return found


def _parts(trained: list[dict[str, Any]], config: ExperimentConfig, first: int, last: int) -> tuple[Part, ...]:
    """Returns the parts of the steps from `first` to `last`, each with the settings that it was trained with."""
    ends = [start["step"] for start in trained[1:]] + [last]
    parts = []
    for start, end in zip(trained, ends, strict=True):
        if end > first and start.get("step", 0) < last:
            settings = {name: start[name] for name in AS_STARTED if name in start}
            is_known = "steps" in start or start is trained[-1]  # experiment.json has the settings of the last one
            train = replace(config.train, **settings)
            if (most := start.get("micro_batch_size")) is not None:  # of an older version
                train = in_parts(train, most)
            parts.append(Part(min(end, last), replace(config, train=train), start, is_known))
    return tuple(parts)
