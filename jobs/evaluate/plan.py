"""The evaluation of a set of samples on disk: what it rests on, which parts are done, its results.

Imports neither torch nor numpy.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion.errors import UserError
from diffusion.problems.images import ImageProblem
from diffusion.problems.problem import SampleFormat
from jobs.experiments.configs import ExperimentConfig
from jobs.files import sha256, write_atomically, write_json
from jobs.sample import sample_set
from jobs.sample.sample_set import DRAWN, SampleSet
from jobs.storage import checkpoints
from jobs.storage.checkpoints import CorruptCheckpoint, Named
from jobs.storage.run_folder import SAMPLES_NAME, RunFolder, check_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEED = 0
"""Decides the resamples of intervals, and all else that is drawn in an evaluation."""
REPLICATES = "replicates.npz"


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a set of samples.

    Results of units are kept in hidden folders: those of the samples beside the samples, those of the weights in the
    run, for all sets drawn with them.
    """

    samples: SampleSet
    protocol: Mapping[str, Any]
    """What determines the results: numbers, seeds, and the hashes of samples, weights, data and features."""
    data_root: str | None = None
    """Where the data lie, if not where the run has found them."""

    @property
    def folder(self) -> Path:
        return self.samples.folder

    @property
    def kept(self) -> Path:
        """The folder for what a job leaves to the next one."""
        return self.folder / ".evaluation"

    @property
    def undrawn(self) -> Path:
        """A file that exists as long as figures are missing."""
        return self.kept / "undrawn"

    def config(self) -> ExperimentConfig:
        """The run's settings, with the data where they lie now."""
        return RunFolder(self.samples.run).read_experiment()[1].moved(self.data_root)

    def result_path(self, unit: str, of: Literal["samples", "weights"]) -> Path:
        """Returns where the result of a unit lies; another protocol has other paths."""
        if of == "samples":
            # The likelihood is the weights' alone, so asking for it computes nothing of the samples again.
            samples = {name: value for name, value in self.protocol.items() if name != "likelihood"}
            return self.kept / f"{unit}-{_key(samples)}.npz"
        hashes = {name: value for name, value in self.protocol["sha256"].items() if name != "samples"}
        weights = {name: self.protocol[name] for name in ("version", "experiment", "model", "diffusion", "seed")}
        return self.samples.run / ".evaluation" / f"{unit}-{_key({**weights, **hashes})}.npz"

    def read(self) -> dict[str, Any]:
        """metrics.json, {} if there is none of this protocol."""
        try:
            found = json.loads((self.folder / "metrics.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        is_ours = isinstance(found, dict) and found.get("protocol") == self.protocol
        return dict(found) if is_ours else {}

    def read_replicates(self) -> "dict[str, NDArray[np.float64]]":
        """The bootstrap replicates of each metric that has them."""
        import numpy as np  # here, because the command line starts without it

        with np.load(self.kept / REPLICATES, allow_pickle=False) as arrays:
            return dict(arrays)

    def is_complete(self) -> bool:
        """Whether the results are there, with or without figures."""
        return bool(self.read()) and (self.kept / REPLICATES).is_file()

    def is_done(self) -> bool:
        """Whether the figures are there, too."""
        return self.is_complete() and not self.undrawn.exists()

    def write(self, results: Mapping[str, Any], replicates: "Mapping[str, NDArray[np.float64]]") -> None:
        """Completes the evaluation. Results of another version are kept: their weights may be gone."""
        path = self.folder / "metrics.json"
        before, version = b"", self.protocol["version"]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or not of ours
            before = path.read_bytes()
            version = int(json.loads(before)["protocol"]["version"])
        if version != self.protocol["version"]:
            write_atomically(self.folder / f"metrics-version-{version}.json", before)
        # metrics.json comes last, so whoever finds this protocol in it finds its replicates, too.
        write_arrays(self.kept / REPLICATES, replicates)
        write_json(path, {"protocol": self.protocol, **results})

    def add_job(self, job_id: str) -> None:
        """Remembers a Slurm job that works on the evaluation, here and with the run."""
        self.kept.mkdir(exist_ok=True)
        RunFolder(self.samples.run).add_job("evaluate_job_ids", job_id, self.kept / "jobs.json")

    def job_ids(self) -> list[str]:
        """Slurm jobs of this run that have worked on the evaluation."""
        return RunFolder(self.samples.run).jobs_in(self.kept / "jobs.json", "evaluate_job_ids")


def write_arrays(path: Path, arrays: "Mapping[str, NDArray[Any]]") -> None:
    """Writes arrays by name, whole or not at all."""
    import numpy as np

    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def plan(
    run: RunFolder, name: str | None, inception: bool = False, likelihood: bool = False, checkpoint: Named | None = None
) -> Evaluation:
    """The evaluation of a complete set of the run: the named one, or the newest, of any checkpoint or of that one.

    Raises UserError where there is none, or where its files are not those that were written.
    """
    experiment, config = run.read_experiment()
    if likelihood and not isinstance(config.data, ImageProblem):
        raise UserError(f"--likelihood is for images, others always have it; got {experiment}")
    chosen = sample_set.read(run, _choose(run, name, checkpoint))
    load_samples(chosen, config.data.sample)
    protocol = {
        "version": config.data.metrics_version,
        "seed": SEED,
        "experiment": experiment,
        "model": asdict(config.model),
        "diffusion": asdict(config.diffusion),
        "samples": {"num_samples": chosen.num_samples, **chosen.settings.as_json()},
        "weights_are_there": True,
        "sha256": {
            "samples": sample_set.hashes_in(chosen.read_manifest())[DRAWN],
            "weights": chosen.settings.weights_sha256,
            **config.data.digest(inception=inception),
        },
        **({"likelihood": True} if likelihood else {}),
    }
    # As JSON gives it back (tuples become lists), because it is compared with what metrics.json says.
    whole = Evaluation(chosen, json.loads(json.dumps(protocol)))
    if _has_weights(run, chosen) or whole.is_complete():  # from before the checkpoint was removed
        return whole
    return replace(whole, protocol={**whole.protocol, "weights_are_there": False})


def complete_sets(run: RunFolder) -> list[str]:
    """The names of the run's complete sets whose samples are there, the newest first."""
    return [name for name in sample_set.complete(run) if (run.samples / name / DRAWN).is_file()]


def load_samples(chosen: SampleSet, sample: SampleFormat) -> "NDArray[Any]":
    """The samples of a complete set; raises UserError unless they are those that were drawn, and can be evaluated."""
    import numpy as np

    path, recorded = chosen.file, sample_set.hashes_in(chosen.read_manifest()).get(DRAWN)
    if sha256(path) != recorded:
        differs = "its sha256 differs from its manifest.json" if recorded else "its manifest.json names no sha256 of it"
        raise UserError(f"{path} is not known to be what was drawn: {differs}; write it again with: {chosen.command}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: NDArray[Any] = arrays["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} must hold the samples as arr_0; it cannot be read: {error}") from None
    wanted = f"{sample.dtype} {[chosen.num_samples, *sample.shape]}"
    if f"{array.dtype} {list(array.shape)}" != wanted:
        raise UserError(f"{path} must hold {wanted}; got {array.dtype} {list(array.shape)}")
    if len(array) < sample.fewest:
        raise UserError(
            f"an evaluation needs at least {sample.fewest} samples; got {len(array)} in {path}: "
            "draw more with `sample --num-samples 1000`"
        )
    finite = np.isfinite(array)
    if not finite.all():
        raise UserError(f"samples must be finite; {int((~finite).sum()):,} of {len(array):,} in {path} are not")
    return array


def _choose(run: RunFolder, name: str | None, checkpoint: Named | None) -> str:
    """The name of the set that a user means."""
    complete = complete_sets(run)
    draw, of = f"python launch.py sample {run} --num-samples 10000", ""
    if checkpoint is not None:
        step = checkpoints.best(run.checkpoints) if checkpoint == "best" else checkpoint
        complete = [name for name in complete if run.read_samples(name).get("step") == step]
        draw, of = f"{draw} --checkpoint {checkpoint}", f" of the checkpoint of step {step}"
    if name is None:
        if not complete:
            raise UserError(f"{run} has no complete set of samples{of}; draw one with: {draw}")
        return complete[0]
    if check_name(name, SAMPLES_NAME) not in complete:
        held = f"it has {', '.join(complete)}" if complete else f"it has none; draw one with: {draw}"
        raise UserError(f"--samples must name a complete set of {run} ({held}); got {name}")
    return name


def _has_weights(run: RunFolder, chosen: SampleSet) -> bool:
    """Whether the checkpoint is there, and holds the weights, with which the samples were drawn."""
    try:
        manifest = checkpoints.verify(run.checkpoints, chosen.settings.step)
    except CorruptCheckpoint:
        return False
    recorded = manifest["files"][checkpoints.weights_file(chosen.settings.weights)]["sha256"]
    return bool(recorded == chosen.settings.weights_sha256)


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
