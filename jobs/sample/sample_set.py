"""A set of samples on disk: its settings, its shards, and how they become one file. Imports neither torch nor numpy."""

import hashlib
import shlex
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from diffusion.errors import UserError
from diffusion.settings import SamplerSettings, require
from jobs.experiments.settings import check_seed
from jobs.experiments.table import EXPERIMENTS
from jobs.files import now_in, sha256, whole, write_atomically, write_json
from jobs.runtime.job import JobError
from jobs.sample import autoguidance
from jobs.sample.autoguidance import Autoguidance
from jobs.sample.classes import check_guidance, label, parse, predictions
from jobs.storage import checkpoints, ownership
from jobs.storage.records import precision_of
from jobs.storage.run_folder import SAMPLES_NAME, RunFolder, check_name, number_of_shards

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.runtime.numerics import Precision

Weights = Literal["ema", "model"]

DRAWN = "samples.npz"
"""All samples of a set in one file, below its folder; arr_0 are the samples, arr_1 their classes, if they have some."""
DRAWING = ".drawing-"
"""Begins the name of a file below a run's folder that is locked by who draws a set."""
MAX_NAME = 255 - len(DRAWING)
"""Letters in the name of a set: file names end at 255 bytes."""
ABANDONED_S = 3600
"""A process that has written nothing for so long to a file that is to appear is not at work on it any more."""
LABEL_BYTES = 8
"""Size of the class of one sample in it."""


@dataclass(frozen=True)
class SampleSettings:
    """What determines the samples of a set, besides the number of them: sample i is a function of these and i."""

    step: int
    """Checkpoint that the weights come from."""
    weights: Weights
    weights_sha256: str
    sampler: SamplerSettings
    seed: int
    precision: "Precision"
    sub_batch_size: int
    shard_size: int
    classes: tuple[int, ...] | None = None
    """Sample i has class classes[i mod n]; None for models without classes."""
    guidance: float | None = None
    """How far these classes are exaggerated (diffusion/process/guidance.py)."""
    autoguidance: Autoguidance | None = None
    compile: bool = False
    """Whether the network is compiled, which changes samples by rounding."""

    @property
    def label(self) -> str:
        """The default name of the set, as in step-00002000-dpm++-25-seed0."""
        model = f"{'-model' if self.weights == 'model' else ''}{'-compiled' if self.compile else ''}"
        guided = f"-{self.autoguidance.label}" if self.autoguidance else ""
        begin, end = f"step-{self.step:08d}-{self.sampler.label}", f"{guided}{model}-seed{self.seed}"
        if not self.classes:
            return begin + end
        begin, end = f"{begin}-classes", f"-guidance{self.guidance:g}{end}"
        told = label(self.classes)
        if len(begin + told + end) > MAX_NAME:
            told = f"{len(self.classes)}-hash{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        return begin + told + end

    @property
    def evaluations(self) -> int:
        """Network evaluations for each sample: guidance takes several for a step."""
        return self.sampler.steps * predictions(self.guidance, self.autoguidance is not None)

    def as_json(self) -> dict[str, Any]:
        """These settings as files hold them; `compile` only if it is so, autoguidance and classes if there are any."""
        values = {**asdict(self), "classes": self.classes and list(self.classes), "compile": self.compile or None}
        return {key: value for key, value in values.items() if value is not None}

    def contradicts(self, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """Yields the settings in which a manifest says otherwise, so that its set cannot go on: its value, and ours."""
        theirs = {"compile": False, **manifest}
        ours = self.as_json()
        for key, value in {**ours, "autoguidance": ours.get("autoguidance")}.items():
            # "auto" is from before it was resolved with the plan.
            if theirs.get(key) != value and (key, theirs.get(key)) != ("precision", "auto"):
                yield key, theirs.get(key), value

    def classes_of(self, start: int, stop: int) -> "NDArray[np.int64]":
        """The classes of samples [start, stop)."""
        import numpy as np  # here, because the command line starts without it

        return np.array(self.classes)[np.arange(start, stop) % len(self.classes or ())]


def plan(run: RunFolder, settings: SampleSettings, num_samples: int, name: str | None) -> "SampleSet":
    """The set of so many samples that a user asks for; raises UserError where that cannot be."""
    require(num_samples >= 1, "--num-samples must be at least 1", num_samples)
    num_bytes = run.read_experiment()[1].data.sample.num_bytes
    found = SampleSet(
        run.path, check_name(settings.label if name is None else name, SAMPLES_NAME), settings, num_samples, num_bytes
    )
    found.check_existing()
    return found


def choose(
    run: RunFolder,
    *,
    seed: int,
    sampler: SamplerSettings,
    weights: Weights,
    checkpoint: checkpoints.Named | None,
    classes: str | None = None,
    guidance: float | None = None,
    autoguided: float | None = None,
    weak: int | None = None,
    begun: Autoguidance | None = None,
    drawn: str | None = None,
    compile: bool = False,
    say: Callable[[str], None],
) -> SampleSettings:
    """What the samples that a user asks for depend on; raises UserError where they cannot be drawn.

    `autoguided` is the scale of autoguidance, `weak` the step of the weak checkpoint; None is the default. `begun` is
    that of a set which goes on: if it is what is asked for, it is taken over unseen, since a complete set needs none.
    So are the weights of such a set, whose checkpoint is gone: `drawn` is their SHA-256.
    """
    experiment, config = run.read_experiment()
    entry = EXPERIMENTS[experiment]
    check_seed("--seed", seed)
    sampler.check(config.diffusion.timesteps)
    told: dict[str, Any] = {}
    if n := config.num_classes:
        scale = entry.guidance if guidance is None else guidance
        check_guidance(scale)
        told = {"classes": parse(classes, n) if classes is not None else tuple(range(n)), "guidance": float(scale)}
    else:
        known = ", ".join(name for name, other in EXPERIMENTS.items() if other.preset.knows_classes)
        for flag, value in (("--classes", classes), ("--guidance", guidance)):
            require(value is None, f"{flag} is for models that know classes ({known}), not for {experiment}", value)
    if drawn is not None and isinstance(checkpoint, int):
        step = checkpoint
    else:
        step, manifest = checkpoints.choose(run.checkpoints, checkpoint, say)
        drawn = manifest["files"][checkpoints.weights_file(weights)]["sha256"]
    guide = begun
    if begun is None or (autoguided, weak) != (begun.scale, begun.step):
        guide = autoguidance.choose(
            *(run, step, weights),
            scale=autoguided,
            weak=weak,
            default=entry.autoguidance,
            keep_every=config.train.keep_every,
            say=say,
        )
    return SampleSettings(
        step=step,
        weights=weights,
        weights_sha256=drawn,
        sampler=sampler,
        seed=seed,
        precision=precision_of(run, config.train.precision, "fp32"),
        sub_batch_size=entry.sub_batch_size,
        shard_size=entry.shard_size,
        autoguidance=guide,
        compile=compile,
        **told,
    )


def read(run: RunFolder, name: str) -> "SampleSet":
    """The set that the run has under this name; raises UserError if its manifest cannot be read."""
    _, config = run.read_experiment()
    path = run.samples / name / "manifest.json"
    try:
        manifest = run.read_samples(name)
        names = [field.name for field in fields(SampleSettings)]
        # `as_json` leaves these out where they say nothing; any other that is missing is a KeyError.
        optional = ("classes", "guidance", "autoguidance", "compile")
        values = {name: manifest[name] for name in names if name in manifest or name not in optional}
        if "classes" in values:
            values["classes"] = tuple(values["classes"])
        values["autoguidance"] = autoguidance_of(manifest)
        settings = SampleSettings(**{**values, "sampler": SamplerSettings(**manifest["sampler"])})
        return SampleSet(run.path, name, settings, manifest["num_samples"], config.data.sample.num_bytes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must describe a set of samples of this version; it does not: {error!r}") from None


def begun_with_other_samplers(run: RunFolder, settings: SampleSettings) -> list["SampleSet"]:
    """The run's incomplete sets under their default names that differ from these settings in the sampler alone.

    Autoguidance belongs to it.
    """
    found = []
    for path, manifest in run.sets():
        if not manifest.get("complete"):
            with suppress(UserError):  # of another version
                found.append(read(run, path.parent.name))
    ways = [(begun, begun.settings.sampler, begun.settings.autoguidance) for begun in found]
    return [
        begun
        for begun, sampler, weak in ways
        if (sampler, weak) != (settings.sampler, settings.autoguidance)
        and begun.name == begun.settings.label
        and not any(replace(settings, sampler=sampler, autoguidance=weak).contradicts(begun.settings.as_json()))
    ]


def sampler_of(written: Mapping[str, Any]) -> SamplerSettings | None:
    """The sampler that a manifest or a line of quality.jsonl names, if it names one."""
    sampler = written.get("sampler")
    return SamplerSettings(**sampler) if sampler else None


def check_step(run: RunFolder, name: str | None, written: Mapping[str, Any]) -> None:
    """Raises UserError if the checkpoint that a manifest names is gone."""
    step = written.get("step")
    if step is not None and step not in checkpoints.steps(run.checkpoints):
        raise UserError(
            f"samples {name} were drawn with the checkpoint of step {step}, which is gone; choose another --name"
        )


def _told_apart(*guides: dict[str, Any] | None) -> list[str]:
    """Kinds of autoguidance as a sentence names them, with their hashes only where all else is equal."""
    named = [f"{one['scale']:g} by step {one['step']}" if one else "1" for one in guides]
    if len({*named}) == len(named):
        return named
    return [f"{name} ({one['weights_sha256'][:8]})" for name, one in zip(named, guides, strict=True) if one]


def autoguidance_of(written: Mapping[str, Any]) -> Autoguidance | None:
    """The autoguidance that a manifest names, if it names one."""
    guided = written.get("autoguidance")
    return Autoguidance(**guided) if guided else None


def complete(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The manifests of the run's complete sets by their names, the newest first."""
    found: list[tuple[float, str, dict[str, Any]]] = []
    for path, manifest in run.sets():
        with suppress(OSError):  # it is just being deleted
            if manifest.get("complete"):
                found.append((path.stat().st_mtime, path.parent.name, manifest))
    return {name: manifest for _, name, manifest in sorted(found, key=lambda entry: entry[:2], reverse=True)}


@dataclass(frozen=True)
class SampleSet:
    """`num_samples` samples with these settings, in the folder RUN/samples/NAME.

    They are cut into shards of fixed size, so that any number of processes does the same work on the same shards.
    """

    run: Path
    name: str
    settings: SampleSettings
    num_samples: int
    bytes_per_sample: int

    @property
    def folder(self) -> Path:
        return RunFolder(self.run).samples / self.name

    @property
    def file(self) -> Path:
        return self.folder / DRAWN

    @property
    def picture(self) -> Path:
        """The picture of the first samples; it is drawn once the set is complete."""
        return self.folder / "grid.png"

    @property
    def command(self) -> str:
        """The command that draws what is missing of the set; the other settings are those of a named set itself."""
        of = self.settings
        told = f" --classes {','.join(map(str, of.classes))} --guidance {of.guidance}" if of.classes else ""
        told += f" --weights {of.weights}" if of.weights != "ema" else ""
        told += f" --seed {of.seed}" if of.seed else ""
        run = RunFolder(self.run)
        named = f"{shlex.quote(str(run))} --name {shlex.quote(self.name)}"
        return f"python launch.py sample {named} --num-samples {self.num_samples}{told}"

    @property
    def num_shards(self) -> int:
        return number_of_shards(self.num_samples, self.settings.shard_size)

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def shard_range(self, shard: int) -> tuple[int, int]:
        """[start, stop) of the samples in a shard; the last shard may be shorter."""
        start = shard * self.settings.shard_size
        return start, min(start + self.settings.shard_size, self.num_samples)

    def has_shard(self, shard: int) -> bool:
        """Whether the shard is there with all its samples, or with more, of a set that was to be larger."""
        import numpy as np  # here, because the command line starts without it

        start, stop = self.shard_range(shard)
        try:
            # Mapped, so that of each of many shards only the header is read.
            return len(np.load(self.shard_path(shard), mmap_mode="r")) >= stop - start
        except (FileNotFoundError, ValueError, EOFError):
            return False

    def read_shard(self, shard: int) -> "NDArray[Any]":
        """The samples of the set in a shard that is there."""
        import numpy as np

        start, stop = self.shard_range(shard)
        samples: NDArray[Any] = np.load(self.shard_path(shard))
        return samples[: stop - start]

    def put_shard(self, shard: int, samples: "NDArray[Any]") -> None:
        """Puts a shard in place, whole or not at all; raises JobError if the set is to hold more samples by now."""
        import numpy as np

        content = BytesIO()
        np.save(content, samples, allow_pickle=False)
        self.check_wanted()
        write_atomically(self.shard_path(shard), content.getvalue())

    def shards_among(self, paths: Collection[Path]) -> list[int]:
        return [shard for shard in range(self.num_shards) if self.shard_path(shard) in paths]

    def remove_abandoned(self) -> None:
        """Removes what killed processes have left half-written; one that goes on, perhaps elsewhere, writes often."""
        for left in self.folder.glob(".*.tmp"):
            with suppress(OSError):  # another process removes it, too, or has finished it
                if now_in(self.folder) - left.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def missing(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self.has_shard(shard)]

    def damaged(self) -> list[Path]:
        """The shards, and the file of a complete set, that are there without the bytes that the manifest has recorded.

        All is read, about a second for each GB.
        """
        manifest = self.read_manifest()
        recorded = hashes_in(manifest)
        there = [self.shard_path(shard) for shard in range(self.num_shards) if self.has_shard(shard)]
        if self._is_merged(manifest):
            there.append(self.file)
        return [path for path in there if path.name in recorded and sha256(path) != recorded[path.name]]

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json, {} if there is none."""
        return RunFolder(self.run).read_samples(self.name)

    def is_complete(self) -> bool:
        return self._is_merged(self.read_manifest()) and not self.missing()

    def _is_merged(self, manifest: Mapping[str, Any]) -> bool:
        # A set that is extended is complete with its old number until its manifest is written anew.
        merged = manifest.get("complete") and manifest["num_samples"] == self.num_samples
        return bool(merged) and DRAWN in hashes_in(manifest) and self.file.is_file()

    def write_manifest(self, **more: Any) -> None:
        """Settings and number of samples; `complete` once all are there, and hashes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {**self.settings.as_json(), "num_samples": self.num_samples, "complete": False, **more}
        write_json(self.folder / "manifest.json", values)

    def add_job(self, job_id: str) -> None:
        """Remembers a Slurm job that works on the set, here and with the run."""
        RunFolder(self.run).add_job("sample_job_ids", job_id, self.folder / ".jobs.json")

    def job_ids(self) -> list[str]:
        """Slurm jobs of this run that have worked on the set."""
        return RunFolder(self.run).jobs_in(self.folder / ".jobs.json", "sample_job_ids")

    def needed_bytes(self) -> int:
        """Disk space for the shards that are missing and for the merged file; none for a set that is complete."""
        if self.is_complete():
            return 0
        missing = sum(stop - start for start, stop in map(self.shard_range, self.missing()))
        labels = LABEL_BYTES * self.num_samples if self.settings.classes else 0
        return (missing + self.num_samples) * self.bytes_per_sample + labels

    def check_disk(self, more: int) -> None:
        """Raises UserError if the disk has no room for the set and for so many bytes more."""
        least = 0 if self.is_complete() else self.num_samples * self.bytes_per_sample
        free, needed = shutil.disk_usage(self.run).free, least + more
        if needed <= free:  # else there may be more shards than can be counted
            needed = self.needed_bytes() + more
        if needed > free:
            raise UserError(
                f"{self.num_samples:,} samples need {needed / 1e9:.2f} GB of disk; "
                f"{free / 1e9:.2f} GB are free in {self.run}"
            )

    def check_existing(self) -> None:
        """Raises UserError if the folder holds samples of other settings, or was complete with more of them."""
        manifest = self.read_manifest()
        if not manifest:
            return
        for key, theirs, ours in self.settings.contradicts(manifest):
            if key == "autoguidance":
                theirs, ours = _told_apart(theirs, ours)
            elif key == "classes" and theirs:
                theirs, ours = (label(classes).replace("+", ",") for classes in (theirs, ours))
            told = f"{key}={theirs}, not {ours}"
            if key == "sampler" and isinstance(theirs, dict):
                other = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
                told = ", not ".join(" ".join(f"{name}={one.get(name)}" for name in other) for one in (theirs, ours))
            raise UserError(f"samples {self.name} were drawn with {told}; choose another --name")
        if (held := _held(manifest)) > self.num_samples:
            raise UserError(
                f"samples {self.name} already hold {held}, more than "
                f"--num-samples {self.num_samples}; choose another --name"
            )

    @contextmanager
    def alone(self) -> Iterator[list[int]]:
        """Keeps other commands from drawing the set meanwhile; raises UserError if one draws it already.

        Yields file descriptors for the processes that draw to inherit. The kernel frees the set when the last of them
        ends, and this one, however they end.
        """
        with ExitStack() as stack:
            try:
                lock = [stack.enter_context(ownership.locked(self.run, f"{DRAWING}{self.name}"))]
            except UserError:  # files cannot be locked here, which is no reason not to draw
                lock = []
            if None in lock:
                raise UserError(f"samples {self.name} are being drawn already, by another command")
            yield [descriptor for descriptor in lock if descriptor is not None]

    def begin(self, planned: Mapping[str, Any], damaged: Collection[Path] = ()) -> None:
        """Writes that the set is being drawn, without the shards that are damaged, and keeps the hashes of the others.

        Raises UserError if the manifest is not the one that the set was planned with.
        """
        if self.read_manifest() != planned:
            raise UserError(f"samples {self.name} have just been changed by another command; start this one again")
        # An export may hold what is damaged.
        for path in [*damaged, *(self.folder.glob("export-*") if damaged else ())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        good = {self.shard_path(shard).name for shard in range(self.num_shards) if self.has_shard(shard)}
        recorded = {name: value for name, value in hashes_in(planned).items() if name in good}
        more = {"held": _held(planned), "sha256": recorded}
        self.write_manifest(**{key: value for key, value in more.items() if value})
        self.remove_abandoned()

    def check_wanted(self) -> None:
        """Raises JobError if the set is to hold more samples by now.

        A lock does not reach other machines everywhere: this is asked before each file takes the place of another.
        """
        if (wanted := self.read_manifest().get("num_samples", 0)) > self.num_samples:
            raise JobError(
                f"samples {self.name} are to hold {wanted} by now, not {self.num_samples}: another command draws them"
            )

    def merge(self) -> None:
        """Writes the file from the shards and completes the manifest. Idempotent; memory does not grow with n.

        Two processes that merge at once write the same bytes. Raises JobError if the set is to hold more by now.
        """
        import numpy as np

        # The header with the shape of the whole set is written first, then shard after shard: one at a time in memory.
        first: NDArray[Any] = np.load(self.shard_path(0), mmap_mode="r")
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (self.num_samples, *first.shape[1:])}
        with whole(self.file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with _member(archive, "arr_0") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for shard in range(self.num_shards):
                    file.write(self.read_shard(shard).data)
            if self.settings.classes:
                header = {"descr": "<i8", "fortran_order": False, "shape": (self.num_samples,)}
                with _member(archive, "arr_1") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for shard in range(self.num_shards):
                        file.write(self.settings.classes_of(*self.shard_range(shard)).astype("<i8").data)
            self.check_wanted()
        # The manifest comes last, because what it calls complete must be there.
        drawn = {self.shard_path(shard).name: sha256(self.shard_path(shard)) for shard in range(self.num_shards)}
        self.check_wanted()
        self.write_manifest(complete=True, sha256={DRAWN: sha256(self.file), **drawn})


def hashes_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The SHA-256 of a set's files by their names, those that its manifest has recorded."""
    recorded = manifest.get("sha256")
    return recorded if isinstance(recorded, dict) else {}


def _held(manifest: Mapping[str, Any]) -> int:
    """With how many samples a set is complete, or was before it began to grow; it keeps all of them."""
    return int(manifest["num_samples"] if manifest.get("complete") else manifest.get("held", 0))


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Opens a new array of an npz file."""
    info = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed, so equal samples make equal files
    return archive.open(info, "w", force_zip64=True)  # how long it becomes is not known yet
