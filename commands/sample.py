"""`sample` draws a set of samples, on this machine or as an array on Slurm."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from commands.arguments import AMONG_OPTIONS, Run, optional
from commands.where import Checkpoint, Launch, show
from diffusion.errors import UserError
from diffusion.settings import SAMPLERS, SamplerName, SamplerSettings
from jobs.experiments.table import EXPERIMENTS, Entry
from jobs.runtime.job import submitted
from jobs.sample import autoguidance, exports, sample_set
from jobs.sample.exports import Form
from jobs.sample.job import SampleJob, SampleMergeJob
from jobs.sample.sample_set import SampleSet, Weights
from jobs.storage import checkpoints, faults, ownership, run_folder
from slurm import queue
from slurm.errors import SlurmError
from slurm.place import ROUNDS, OnSlurm


def _defaults(of: Callable[[Entry], object]) -> str:
    """Writes the experiments' defaults for the help, equal ones together, without those that are None."""
    names: dict[object, list[str]] = {}
    for name, entry in EXPERIMENTS.items():
        if (value := of(entry)) is not None:
            names.setdefault(value, []).append(name)
    return "; ".join(f"{value} for {', '.join(same)}" for value, same in names.items())


def _of_other_samplers() -> str:
    """The steps of a sampler that is not the experiment's own, for the help."""
    steps = (f"{kind.default_steps or 'all timesteps'} for {name}" for name, kind in SAMPLERS.items())
    return f"with another sampler {', '.join(steps)}"


def _samplers() -> str:
    """The samplers, for the help."""
    *names, last = (f"{name} ({kind.help})" if kind.help else name for name, kind in SAMPLERS.items())
    return f"{', '.join(names)}, or {last}."


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws samples of a trained model; run again, draws what is missing."""

    run: Run
    num_samples: int = 64
    """Samples in the set. A larger number extends a set that exists."""
    seed: int = 0
    """Sample i depends on the seed and i, not on the number of samples or processes."""
    sampler: Annotated[
        SamplerName | None,
        optional(f"{{{','.join(SAMPLERS)}}}", _defaults(lambda entry: entry.sampler.sampler)),
        arg(help=_samplers()),
    ] = None
    steps: Annotated[
        int | None, optional("INT", f"{_defaults(lambda entry: entry.sampler.steps)}; {_of_other_samplers()}")
    ] = None
    """Steps of the sampler: a network evaluation each, or two with guidance or autoguidance, four with both."""
    eta: Annotated[float | None, optional("FLOAT", "0")] = None
    """Noise of ddim: 0 is deterministic, 1 as random as ddpm."""
    weights: Weights = "ema"
    """The moving average of the weights, or the weights themselves."""
    checkpoint: Checkpoint = None
    classes: Annotated[str | None, optional("LIST", "all of them")] = None
    """Classes to draw, such as 7, 3,5 or 0-9: sample i has the (i mod n)-th of these n. For models that know
    classes."""
    guidance: Annotated[
        float | None,
        optional("S", _defaults(lambda entry: f"{entry.guidance:g}" if entry.preset.knows_classes else None)),
    ] = None
    """How far the classes are exaggerated: 1 is not at all, 0 is without classes (Ho & Salimans 2022, S = 1 + w). Any
    other scale takes two network evaluations a step."""
    autoguidance: Annotated[
        float | None,
        optional(
            "S",
            _defaults(lambda entry: f"{entry.autoguidance:g}" if entry.autoguidance != 1 else None)
            + " with its own sampler, if the run has kept such a checkpoint; else 1",
        ),
    ] = None
    """How far predictions are led away from those of an earlier checkpoint, for plainer samples: 1 is not at all
    (Karras et al. 2024). Any other scale takes two network evaluations a step."""
    weak_checkpoint: Annotated[
        int | None,
        optional("STEP", "of those that --train.keep-every has kept, the one nearest to a quarter of the steps"),
    ] = None
    """That earlier checkpoint."""
    compile: FlagCreatePairsOff[bool] = False
    """Compile the network with torch.compile: about a minute first, in each process, and quicker evaluations on a GPU
    afterwards. For large sets; it needs a C++ compiler, and changes samples by rounding. A named set goes on as it was
    begun."""
    name: Annotated[str | None, optional("NAME", "what was used, like step-00002000-dpm++-25-seed0")] = None
    """Name of the set."""
    export: Annotated[Form | None, optional("{adm,png,zip,npy}", "none")] = None
    """Write the set for other tools, too: OpenAI's npz (arr_0 with three channels), a folder of PNGs, a zip file of
    PNGs, or one array. A set that is complete is not drawn again."""
    where: Annotated[Launch, AMONG_OPTIONS] = field(default_factory=Launch)

    def __call__(self) -> int:
        run = run_folder.find(self.run, self.where.runs_dir)
        experiment, config = run.read_experiment()
        default, timesteps = EXPERIMENTS[experiment].sampler, config.diffusion.timesteps
        # A set that is there goes on as it was begun, whatever the default has become since.
        there = run.read_samples(self.name) if self.name is not None else {}
        if self.sampler is None and self.steps is None:
            default = sample_set.sampler_of(there) or default
        autoguided, weak, guided = self.autoguidance, self.weak_checkpoint, sample_set.autoguidance_of(there)
        if guided is not None and autoguided != 1:
            autoguided = guided.scale if autoguided is None else autoguided
            weak = guided.step if weak is None else weak
        elif there and weak is None:
            autoguided = 1.0 if autoguided is None else autoguided
        name = self.sampler if self.sampler is not None else default.sampler
        if name != EXPERIMENTS[experiment].sampler.sampler and weak is None:
            autoguided = 1.0 if autoguided is None else autoguided
        usual = default.steps if name == default.sampler else SAMPLERS[name].default_steps or timesteps
        # A process with fewer timesteps than that has no more of them to visit.
        steps = self.steps if self.steps is not None else min(usual, timesteps)
        checkpoint = self.checkpoint if self.checkpoint is not None else there.get("step")
        # A set that is complete needs its checkpoint no more, unless it is to grow, or has been damaged.
        is_gone = bool(there) and checkpoint == there.get("step") not in checkpoints.steps(run.checkpoints)
        if is_gone and not there.get("complete"):
            sample_set.check_step(run, self.name, there)
        say = partial(print, file=sys.stderr) if self.where.dry_run else print  # what it shows can be parsed
        settings = sample_set.choose(
            run,
            seed=self.seed,
            sampler=SamplerSettings(sampler=name, steps=steps, eta=default.eta if self.eta is None else self.eta),
            weights=self.weights,
            checkpoint=checkpoint,
            classes=self.classes,
            guidance=self.guidance,
            autoguided=autoguided,
            weak=weak,
            begun=guided,
            drawn=there.get("weights_sha256") if is_gone else None,
            compile=self.compile or bool(there.get("compile")),
            say=say,
        )
        asked = sample_set.plan(run, settings, self.num_samples, self.name)
        planned = asked.read_manifest()
        where = f"{run}/samples/{asked.name}"
        if self.export is not None:
            exports.check(self.export, config.data.sample.shape)
        asked.check_disk(more := exports.needed_bytes(asked, self.export, config.data.sample.shape))
        # Of a complete set, too: who is told that all is there, or is given an export, relies on it. A second for each
        # GB is little beside the hours that the set took.
        damaged = asked.damaged()
        missing = tuple(sorted({*asked.missing(), *asked.shards_among(damaged)}))
        if missing:
            sample_set.check_step(run, self.name, there)
        for path in damaged:
            again = "put together" if path == asked.file else "drawn"
            say(f"WARNING: {where}/{path.name} has changed since it was written; it is {again} again")
        # The picture is drawn last: where it is missing, the merge did not come to its end and is done again.
        if asked.is_complete() and asked.picture.exists() and not damaged:
            print(f"{asked.num_samples:,} samples are in {where} already.")
            if not self.where.dry_run:
                exports.export(asked, self.export)
                self._say_export(asked, where)
            return 0
        if missing and guided is not None and settings.autoguidance == guided:  # taken over unseen
            autoguidance.check(run, guided, settings.weights)
        place = self.where.place(run)
        device, retries = self.where.resolve_device(place, asked.settings.precision), self.where.retries_at(place)
        job = SampleJob(asked, missing, self.where.processes, device, merge=True, export=self.export, retries=retries)
        merge = SampleMergeJob(asked, self.export)
        # On Slurm an array; with more elements than GPUs, so a slow or late one holds up less, if they start fast.
        count = min((1 if settings.compile else 4) * self.where.processes, len(missing))
        if isinstance(place, OnSlurm):
            count = place.elements(count)
        elements = [replace(job, shards=missing[i::count], processes=1, merge=False) for i in range(count)]
        if self.where.dry_run:
            what = place.describe(job)
            if isinstance(place, OnSlurm):
                what = replace(place, processes=1).describe_array(elements, place.processes, merge)
            return show({**asked.settings.as_json(), "num_samples": asked.num_samples}, what)
        for job_id, state in queue.active(asked.job_ids()).items():
            raise UserError(f"{where} is being drawn already: job {job_id} is {state}")
        if isinstance(place, OnSlurm):
            place = replace(place, processes=1)  # the elements of an array are one task each
            place.check_array(elements, merge)
        is_plain = (self.name, self.autoguidance, self.weak_checkpoint) == (None, None, None)
        if is_plain and not planned:
            # Their sampler may have been the default when they were begun, or their autoguidance.
            names_one = (self.sampler, self.steps, self.eta) != (None, None, None)
            for begun in sample_set.begun_with_other_samplers(run, settings):
                if names_one and begun.settings.sampler != settings.sampler:
                    continue
                with suppress(SlurmError):  # it is a hint, for which no command fails
                    if queue.active(begun.job_ids()):
                        continue
                flags = f"--name {begun.name} --num-samples {max(begun.num_samples, asked.num_samples)}"
                rest = f"the same command with {flags} draws the rest of that set"
                print(f"{begun.name} is incomplete; unless it is being drawn just now, {rest}.")
        is_kept = planned.get("complete") is False  # by a training that goes on, as long as the set is incomplete
        if missing and not is_kept and settings.step not in checkpoints.steps(run.checkpoints):
            return self()  # it has just been deleted: a newer one is taken, or one sentence says that it is gone
        with asked.alone() as lock:
            print(f"{asked.num_samples:,} samples need {(asked.needed_bytes() + more) / 1e6:,.1f} MB of disk.")
            # Before the job waits: as long as this says that the set is not complete, a training keeps its checkpoint.
            asked.begin(planned, damaged)
            faults.forgive_set(asked.folder)
            if isinstance(place, OnSlurm):
                self.where.copy_code(place)
                place.run_array(elements, submitted, self.where.processes, merge, min(ROUNDS, retries))
                if not self.where.wait:
                    return 0
                # The ids are asked for again and again, because the last job submits more if elements were lost.
                place.wait(asked.job_ids, lambda: False if asked.is_complete() else None)
                code = 0
            else:
                # By this open file `cancel` finds the processes, whichever sets they draw.
                with ownership.sampling(run.path) as descriptor:
                    code = place.run(job, keep_open=[descriptor, *lock])
        if code == 0 and not asked.is_complete():
            why = "some are missing, or another command has asked for another number of them"
            print(f"{where} does not hold these {asked.num_samples:,} samples: {why}.", file=sys.stderr)
            return 1
        if code == 0:
            files = ", ".join(file.name for file in (asked.file, asked.picture) if file.exists())
            print(f"{asked.num_samples:,} samples are in {where}: {files}.")
            self._say_export(asked, where)
        return code

    def _say_export(self, asked: SampleSet, where: str) -> None:
        if self.export is not None:
            print(f"For other tools: {where}/{exports.path(asked, self.export).name}")
