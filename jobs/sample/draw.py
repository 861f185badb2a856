"""The sampling job: draws shards of a set of samples, and merges them when all are there."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count, repeat

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from diffusion.process.cuda_graphs import in_one_launch
from diffusion.process.guidance import autoguided, guided
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import FUNCTIONS, Denoiser
from diffusion.process.transfer import sent
from jobs.health import gpu_test
from jobs.health.watchdog import COMPILING, DRAWING, Watchdog
from jobs.runtime.compiling import chooses_in_order, compiled_at_first
from jobs.runtime.job import JobError, process_rank
from jobs.runtime.numerics import Kind, lacking, own_device, resolve_precision, set_numerics
from jobs.runtime.prefetch import Prefetch
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.runtime.surroundings import decorate
from jobs.sample.sample_set import SampleSet, SampleSettings, Weights
from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress
from jobs.terminal.tables import duration


def sample(samples: SampleSet, shards: Sequence[int], device: Kind, signals: SignalWatch, watchdog: Watchdog) -> None:
    """Draws these shards; raises Stopped when a signal comes."""
    run = RunFolder(samples.run)
    precision = resolve_precision(samples.settings.precision, device)
    if reason := lacking(precision, device):
        raise JobError(reason)
    set_numerics(precision)
    where = own_device(device)
    if not shards:
        return  # no weights are needed, which may be gone
    experiment, model = load_model(run, samples.settings, where)
    guide = load_guide(run, experiment, samples.settings, where)

    console, compiled = Console(run.log), samples.settings.compile
    evaluate = evaluation(model, guide, compiled, device, console.say)
    patience = chain([COMPILING] if compiled else [], repeat(DRAWING))
    shard, evaluations = 0, count(1)

    def predict(xt: Tensor, t: Tensor, *classes: Tensor) -> Tensor:
        if signals.requested is not Stop.NO:
            raise Stopped
        # A GPU may have much to do after the host has launched the last one.
        watchdog.phase(f"evaluation {next(evaluations)} of shard {shard}", next(patience))
        try:
            return evaluate(xt, t, *classes)
        except JobError as error:
            if signals.requested is not Stop.NO:  # the signal may have killed the compilers
                raise Stopped from None
            raise JobError(f"{error}; another set (--name) can be drawn without --compile") from error

    progress = Progress(console, "sample", len(shards), 0, "samples", samples.settings.shard_size)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        for done, shard in enumerate(shards):
            evaluations = count(1)
            write_shard(samples, shard, experiment, predict, model.alphas_cumprod)
            if process_rank() == 0:
                progress.update(done + 1, "")
    progress.close()


def evaluation(
    model: DiffusionModel,
    guide: tuple[DiffusionModel, float] | None,
    compiled: bool,
    device: Kind,
    say: Callable[[str], None],
) -> Callable[..., Tensor]:
    """The model's `predict` as jobs evaluate it: compiled at its first call if asked for, on a GPU in one launch.

    `guide` is the weak model that guides it, and how strongly. Raises JobError where processes would not compile it
    into the same code.
    """
    evaluate: Callable[..., Tensor] = model.predict
    networks = [model.network]
    if guide is not None:
        weak, scale = guide
        evaluate = autoguided(model.predict, weak.predict, scale)
        networks.append(weak.network)
    if compiled and device == "cuda" and not chooses_in_order():
        raise JobError(
            f"--compile needs torch 2.10 or newer on a GPU: torch {torch.__version__} takes whichever kernels are the "
            "fastest in each process"
        )

    def done(seconds: float) -> None:
        if process_rank() == 0:
            say(f"Compiled the network in {duration(seconds)} (--compile).")

    if compiled:
        evaluate = compiled_at_first(networks, evaluate, done)
    return in_one_launch(evaluate, say) if device == "cuda" else evaluate


def write_shard(
    samples: SampleSet, shard: int, experiment: Experiment, predict: Callable[..., Tensor], abar: Tensor
) -> None:
    """Draws one shard and puts it in place.

    Raises JobError for samples that are not finite, and if the set is to hold more of them by now.
    """
    start, stop = samples.shard_range(shard)
    size = samples.settings.sub_batch_size
    # Always full sub-batches, so that a sample does not depend on how many are asked for; the surplus is dropped.
    firsts = range(start, stop, size)
    parts = [draw(predict, abar, experiment, samples.settings, first, first + size) for first in firsts]
    x0 = torch.cat(parts)[: stop - start]
    # As pixels they would be black, and as good as any other.
    if bad := int((~torch.isfinite(x0)).flatten(1).any(1).sum()):
        raise JobError(
            f"{bad:,} of the {len(x0):,} samples from {start:,} on are not finite: "
            "choose less guidance, another sampler or other weights, and another --name"
        )
    samples.put_shard(shard, experiment.to_array(x0))


def draw(
    predict: Callable[..., Tensor],
    abar: Tensor,
    experiment: Experiment,
    settings: SampleSettings,
    start: int,
    stop: int,
) -> Tensor:
    """Samples [start, stop), [stop - start, *sample_shape]: sample i is a function of weights, settings, seed and i.

    `predict` takes xt and t, and classes if the settings have some.
    """

    def numbers(stream: Stream, step: int) -> NDArray[np.float32]:
        return normal(settings.seed, stream, step, start, stop, experiment.sample_shape)

    ahead = Prefetch(partial(numbers, Stream.SAMPLE_STEP))

    def noise(k: int) -> Tensor:
        drawn = sent(ahead.of(k), abar.device)
        if abar.device.type == "cuda" and k + 2 < settings.sampler.steps:  # the last step takes none
            ahead.begin(k + 1)
        return drawn

    if settings.guidance is not None:
        classes = sent(settings.classes_of(start, stop), abar.device)
        predict = guided(predict, classes, experiment.num_classes, settings.guidance)
    # The schedule stays on the host: samplers read single numbers of it, and would wait for the GPU at each.
    denoiser = Denoiser(predict, abar.double().cpu(), experiment.clip)
    xt, sampler = sent(numbers(Stream.SAMPLE_START, 0), abar.device), settings.sampler
    *_, x0 = FUNCTIONS[sampler.sampler](denoiser, xt, steps=sampler.steps, noise=noise, eta=sampler.eta)
    return x0


def load_model(run: RunFolder, settings: SampleSettings, device: torch.device) -> tuple[Experiment, DiffusionModel]:
    """The run's experiment and model with the weights that the settings name; MachineError on a GPU that is broken."""
    gpu_test.check(device, seconds=0)
    _, config = run.read_experiment()
    experiment = config.build()
    return experiment, _load(run, experiment, settings.step, settings.weights, settings.weights_sha256, device)


def load_guide(
    run: RunFolder, experiment: Experiment, settings: SampleSettings, device: torch.device
) -> tuple[DiffusionModel, float] | None:
    """The model with the weak weights that the settings name, and how strongly it guides; None if they name none."""
    if (weak := settings.autoguidance) is None:
        return None
    model = _load(run, experiment, weak.step, settings.weights, weak.weights_sha256, device)
    return model, weak.scale


def _load(
    run: RunFolder, experiment: Experiment, step: int, weights: Weights, expected: str, device: torch.device
) -> DiffusionModel:
    model = experiment.build_model()
    path = run.checkpoints / checkpoints.folder_name(step) / checkpoints.weights_file(weights)
    try:
        content = path.read_bytes()  # once: a training that goes on may delete it at any moment
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != expected:  # it was verified when the job was planned
        raise JobError(
            f"{path} is not the file that these samples are drawn with: it is gone, or has changed. "
            "The same command does what can be done without it; another --name begins another set"
        )
    model.network.load_state_dict(load(content))
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def merge(samples: SampleSet) -> None:
    """Merges the shards, which must all exist, and draws a picture of the first; skips what is done already."""
    run = RunFolder(samples.run)
    if not samples.is_complete():
        samples.check_wanted()
        # It is of the set as it was before it grew. As long as there is none, this is not done.
        samples.picture.unlink(missing_ok=True)
        samples.merge()
    if not samples.picture.exists():
        _, config = run.read_experiment()
        first = samples.read_shard(0)
        classes = samples.settings.classes_of(0, len(first)) if samples.settings.classes else None
        decorate(samples.picture.name, lambda: config.build().draw_samples(first, samples.picture, classes), print)
