"""Speed of whole commands: start-up, what a step costs besides computing, one process against two, large sets of 1d."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Alternative, Measurements, Row, limit, ratio
from benchmarks.sampling import planned
from benchmarks.tracking import timed
from jobs.storage.provenance import ROOT

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind

IMPORTS = "import torch, accelerate, numpy, denoising_diffusion_pytorch"
"""What any training of this kind imports."""
SAMPLES_1D, STEPS_1D = 1_000_000, 36
TINY = ("--train.steps", 1, "--train.batch-size", 64, "--device", "cpu", "--cluster", "local")


def command(*arguments: object, cwd: Path, **env: str) -> float:
    """Runs `launch.py ARGUMENTS` to its end; returns the seconds that it took."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "launch.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def peak_memory(*arguments: object, cwd: Path) -> float:
    """Runs `launch.py ARGUMENTS`; returns the most MB that one of its processes has held."""
    # A process's peak includes that of the one that started it, which is large here: so a small one in between.
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", between, sys.executable, ROOT / "launch.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return int(printed) / 1000


def devices(device: "Kind") -> int:
    """How many processes this machine can give a device of its own."""
    if device == "cpu":
        return os.cpu_count() or 1
    import torch

    return torch.cuda.device_count()


def large_sets(run: Path, device: "Kind") -> Iterator[Row]:
    """A million samples of a trained 1d: memory of the command, time of the sampling phase, W1 of the samples."""
    with copied(run) as copy:
        drawn = ("sample", copy, "--sampler", "dpm++", "--steps", 3, "--device", device, "--cluster", "local")
        peaks = [peak_memory(*drawn, "--num-samples", n, "--name", f"of-{n}", cwd=copy) for n in (1000, SAMPLES_1D)]
        alternative = Alternative(sampling_phase, copy, device)
        try:
            phase = alternative.measure()
        finally:
            alternative.close()
    few, many = peaks
    yield limit(f"memory for {SAMPLES_1D:,} samples of `1d`, in times of that for 1,000", "", [many / few], 1.1)
    yield limit(f"{SAMPLES_1D:,} samples of `1d` by `dpm++` {STEPS_1D}", "s", [phase["seconds"]], 30)
    yield limit("their W1 to the exact mixture", "", [phase["w1"]], 0.01)


def sampling_phase(run: Path, device: "Kind") -> Measurements:
    """What a sampling job of a process does after its imports: loads the model, draws shards and writes them."""
    import numpy as np
    import torch

    from diffusion.gaussian1d.distances import wasserstein1
    from diffusion.gaussian1d.mixture import Mixture
    from diffusion.problems.gaussian1d import Gaussian1dProblem
    from jobs.health.watchdog import Watchdog
    from jobs.runtime.malloc import keep_freed_memory
    from jobs.runtime.signals import SignalWatch
    from jobs.sample.draw import sample
    from jobs.storage.faults import HANG
    from jobs.storage.run_folder import RunFolder

    keep_freed_memory()
    _, config = RunFolder(run).read_experiment()
    if not isinstance(config.data, Gaussian1dProblem):
        raise ValueError(f"{run} must be a run of 1d")
    asked = planned(run, "dpm++", STEPS_1D, SAMPLES_1D)
    asked.write_manifest()
    with SignalWatch() as signals:
        started = time.perf_counter()
        sample(asked, asked.missing(), device, signals, Watchdog(run / HANG))
        seconds = time.perf_counter() - started
    drawn = np.concatenate([np.load(asked.shard_path(shard)) for shard in range(asked.num_shards)])
    assert len(drawn) == SAMPLES_1D
    yield {"seconds": seconds, "w1": wasserstein1(torch.from_numpy(drawn), Mixture.of(config.data))}


def digits(run: Path, device: "Kind") -> Iterator[Row]:
    """Ten thousand digits of a trained mnist-small, from the start of the command to its end."""
    for processes in (1, 2) if devices(device) > 1 else (1,):
        with copied(run) as copy:
            drawn = ("sample", copy, "--num-samples", 10_000, "--sampler", "ddpm", "--steps", 20)
            where = ("--device", device, "--cluster", "local", "--gpus", processes)
            seconds = command(*drawn, *where, cwd=copy)
        yield limit(f"10,000 digits by `ddpm` 20, the whole command, `--gpus {processes}`", "s", [seconds], 240)


@contextlib.contextmanager
def copied(run: Path) -> Iterator[Path]:
    """A copy of a trained run that has no samples yet."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "runs" / run.parent.name / "copy"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("samples", "wandb", "code"))
        yield copy


def start_up(rounds: int) -> Iterator[Row]:
    """How long a user waits for an answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield limit("`--help`", "s", [command("--help", cwd=folder) for _ in range(rounds)], 0.3)
        command("train", "1d", *TINY, "--name", "run0", cwd=folder)
        for i in range(1, 50):
            shutil.copytree(folder / "runs" / "1d" / "run0", folder / "runs" / "1d" / f"run{i}")
        yield limit("`status` of 50 runs", "s", [command("status", cwd=folder) for _ in range(rounds)], 0.3)
        ratios = [_first_step(folder, f"first{i}") / _imports() for i in range(rounds)]
        yield limit("`train` until its first step is logged, in times of the bare imports", "", ratios, 1.5)


def submission(rounds: int) -> Iterator[Row]:
    """How long `train` takes to submit, less what sbatch itself does; needs a Slurm that answers."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise RuntimeError("submission needs a Slurm, such as `python -m slurm.devcluster` starts")
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock, times = folder / "bin" / "sbatch", folder / "times"
        clock.parent.mkdir()
        clock.write_text(
            f'#!/bin/sh\nstart=$(date +%s.%N)\n{sbatch} "$@"\ncode=$?\n'
            f'echo "$start $(date +%s.%N)" >{times}\nexit $code\n'
        )
        clock.chmod(0o755)
        path = f"{clock.parent}:{os.environ['PATH']}"
        for i in range(rounds):
            where = ("--cluster", "slurm", "--device", "cpu", "--name", f"run{i}")
            whole = command("train", "1d", *where, cwd=folder, PATH=path)
            start, end = map(float, times.read_text().split())
            seconds.append(whole - (end - start))
            command("cancel", f"1d/run{i}", cwd=folder)
    yield limit("submission, besides sbatch itself", "s", seconds, 1)


def overhead(rounds: int) -> Iterator[Row]:
    """The share of a step that is not forward pass, backward pass and optimizer, tracking offline; on a CPU.

    Noise is not drawn by a thread here but when it is needed: on a CPU the thread takes its time from the step anyway,
    now inside the passes, now outside.
    """
    for experiment, steps, at_most in (("mnist-small", 150, 3.0), ("1d", 1500, 25.0)):
        shares = []
        for _ in range(rounds):
            alternative = Alternative(overhead_of, experiment, steps)
            shares.append(alternative.measure()["percent"])
            alternative.close()
        yield limit(f"a step of `{experiment}` besides computing", "% of it", shares, at_most)


def overhead_of(experiment: str, steps: int) -> Measurements:
    """One training in this process, from its first step to its last."""
    import jobs.train.loop
    import launch
    from jobs.runtime.prefetch import Prefetch
    from jobs.train.state import Training

    seconds = {"steps": 0.0, "compute": 0.0}

    initialise = Training.__init__

    def with_clocks(training: Training, *arguments: Any) -> None:
        initialise(training, *arguments)
        training.optimizer.step = timed(training.optimizer.step, seconds, "compute")  # type: ignore[method-assign]
        training.optimizer.zero_grad = timed(training.optimizer.zero_grad, seconds, "compute")  # type: ignore[method-assign]

    # The optimizer is made in __init__: only after that are there methods to time.
    Training.__init__ = with_clocks  # type: ignore[method-assign, assignment]
    Training._pass = timed(Training._pass, seconds, "compute")  # type: ignore[method-assign]
    Prefetch.begin = lambda prefetch, step: None  # type: ignore[method-assign, assignment]
    jobs.train.loop.run_steps = timed(jobs.train.loop.run_steps, seconds, "steps")
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        sys.argv = [str(ROOT / "launch.py"), "train", experiment, "--cluster", "local", "--device", "cpu"]
        sys.argv += ["--runs-dir", folder, "--train.steps", str(steps)]
        code = launch.main()
    if code != 0:
        raise RuntimeError(f"the training ended with exit code {code}")
    yield {"percent": 100 * (1 - seconds["compute"] / seconds["steps"])}


def scaling(rounds: int, device: "Kind") -> Iterator[Row]:
    """Two processes against one, one thread each: the same batch, divided, as steps and shards tell it themselves."""
    if devices(device) < 2:
        print("scaling needs two GPUs; it is left out", file=sys.stderr)
        return
    found: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for i in range(rounds):
            for processes in (1, 2):
                for what, rate in _rates(Path(name), f"run{i}-{processes}", processes, device).items():
                    found.setdefault(what, {1: [], 2: []})[processes].append(rate)
    for what, rates in found.items():
        at_least = 1.9 if what.startswith("sampling") else 1.75
        yield ratio(f"{what}, 2 processes against 1", rates[2], rates[1], "1 process", at_least)


def _rates(folder: Path, name: str, processes: int, device: "Kind") -> dict[str, float]:
    """Images per second of short trainings and of sampling the small network."""
    where = ("--cluster", "local", "--device", device, "--gpus", processes)
    rates = {}
    for experiment, steps, log_every in (("mnist", 16, 2), ("mnist-small", 150, 20)):
        # Few timesteps: a training draws digits at its end, and each of its steps takes one timestep of an image.
        settings = ("--train.steps", steps, "--train.log-every", log_every, "--diffusion.timesteps", 21)
        command("train", experiment, *settings, "--name", name, *where, cwd=folder, OMP_NUM_THREADS="1")
        timing = (folder / "runs" / experiment / name / "timing.jsonl").read_text().splitlines()
        progress = [line for line in map(json.loads, timing) if line["event"] == "progress"]
        # Without the first line, whose steps have warmed up.
        rates[f"training `{experiment}`"] = statistics.median(line["images_per_s"] for line in progress[1:])
    drawn = ("--num-samples", 4096, "--sampler", "ddim", "--steps", 5, "--name", "a")
    command("sample", f"mnist-small/{name}", *drawn, *where, cwd=folder, OMP_NUM_THREADS="1")
    shards = (folder / "runs" / "mnist-small" / name / "samples" / "a").glob("shard-*.npy")
    times = sorted(path.stat().st_mtime for path in shards)
    # From the end of each process's first shard to that of its last.
    seconds = times[-1] - times[processes - 1]
    # A shard of this experiment has 256 samples.
    return {**rates, "sampling `mnist-small`": (len(times) - processes) * 256 / seconds}


def _first_step(folder: Path, name: str) -> float:
    """Seconds from the start of `train 1d` until its first step is in metrics.jsonl."""
    metrics = folder / "runs" / "1d" / name / "metrics.jsonl"
    started = time.perf_counter()
    arguments = ["train", "1d", "--name", name, "--device", "cpu", "--cluster", "local", "--train.log-every", "1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *arguments],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
    )
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError("the training ended before its first step")
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    return seconds


def _imports() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - started
