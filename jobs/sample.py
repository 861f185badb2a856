"""The sampling job: draws the shards that are missing; whoever finishes the last one merges them."""

import numpy as np
import torch
from torch import Tensor

from diffusion.model import DiffusionModel, Experiment
from diffusion.randomness import Stream, normal
from diffusion.samplers import SAMPLERS
from jobs import checkpoints
from jobs.files import write_atomically
from jobs.progress import Console, Progress
from jobs.run_folder import RunFolder
from jobs.samples import SampleSet, SampleSettings
from jobs.world import Kind


def sample(samples: SampleSet, rank: int, processes: int, device: Kind) -> int:
    """Draws shards rank, rank + processes, ... where they are missing; returns the exit code."""
    run = RunFolder(samples.run)
    experiment, model = load_model(run, samples.settings, torch.device(device, _local_gpu() if device == "cuda" else 0))
    console = Console(run.log)
    shards = range(rank, samples.num_shards, processes)
    progress = Progress(console, "sample", samples.num_samples, 0, "samples", 1)
    done = 0
    for shard in shards:
        start, stop = samples.shard_range(shard)
        if not samples.has_shard(shard):
            write_shard(samples, shard, experiment, model)
        done += stop - start
        if rank == 0:
            progress.update(min(done * processes, samples.num_samples), "")
    progress.close()
    if not samples.missing() and not samples.is_complete():
        finish(samples, experiment)
    return 0


def write_shard(samples: SampleSet, shard: int, experiment: Experiment, model: DiffusionModel) -> None:
    """Draws one shard and puts it in place."""
    start, stop = samples.shard_range(shard)
    size = samples.settings.sub_batch_size
    # Full sub-batches always, so that a sample does not depend on how many are asked for; what is too much is dropped.
    parts = [draw(model, experiment, samples.settings, first, first + size) for first in range(start, stop, size)]
    array = experiment.to_array(torch.cat(parts)[: stop - start])
    write_atomically(samples.shard_path(shard), _npy(array))


def draw(model: DiffusionModel, experiment: Experiment, settings: SampleSettings, start: int, stop: int) -> Tensor:
    """Samples [start, stop), [stop - start, *sample_shape]: sample i is a function of weights, settings, seed and i."""
    device = model.alphas_cumprod.device

    def noise(stream: Stream, step: int) -> Tensor:
        return torch.from_numpy(normal(settings.seed, stream, step, start, stop, experiment.sample_shape)).to(device)

    sampler = SAMPLERS[settings.sampler.sampler]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        *_, x0 = sampler(
            model.predict,
            noise(Stream.SAMPLE_START, 0),
            model.alphas_cumprod.double().cpu(),
            steps=settings.sampler.steps,
            eta=settings.sampler.eta,
            noise=lambda k: noise(Stream.SAMPLE_STEP, k),
            clip=experiment.clip,
        )
    return x0


def load_model(run: RunFolder, settings: SampleSettings, device: torch.device) -> tuple[Experiment, DiffusionModel]:
    """The run's experiment and model with the weights that the settings name."""
    _, config = run.read_experiment()
    experiment = config.build()
    model = experiment.build_model()
    snapshot = checkpoints.load(run.checkpoints, settings.step)
    model.network.load_state_dict(snapshot.ema if settings.weights == "ema" else snapshot.model)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return experiment, model.eval()


def finish(samples: SampleSet, experiment: Experiment) -> None:
    """Merges the shards and draws a picture of the first of them."""
    samples.merge()
    experiment.draw_samples(np.load(samples.shard_path(0)), samples.folder / "grid.png")


def _npy(array: np.ndarray) -> bytes:
    from io import BytesIO

    file = BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _local_gpu() -> int:
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))
