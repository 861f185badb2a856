"""A training of `mnist` that is interrupted once, its digits, and their Frechet distance: the commands of a user."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.commands import command
from benchmarks.comparison import Row, limit
from benchmarks.quality import frechet
from jobs.storage.provenance import ROOT
from jobs.storage.records import last_step
from jobs.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind

NAME = "survival"
"""Of the run."""
DIGITS = 10_000
TINY = (
    *("--model.dim", 8, "--model.dim-mults", 1, "--model.attn-heads", 1),
    *("--train.batch-size", 4, "--diffusion.timesteps", 50),
)
"""What makes a run of `mnist-small` a matter of seconds on a CPU."""
NO_FIGURES = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "no_figures"), *filter(None, [os.environ.get("PYTHONPATH")])])
}
"""For a rehearsal's commands: they find no plotting library, and end without the figures, which take as long again."""
FRECHET_AT_MOST = 2.0
"""Of as many real digits it is about 0.1."""


def rows(runs: Path, device: "Kind", small: bool) -> Iterator[Row]:
    """Trains `mnist` into `runs`, with Ctrl-C on the way, draws digits, and compares them with real ones."""
    import numpy as np

    experiment, steps = "mnist", 4000
    settings: tuple[object, ...] = ()
    env: dict[str, str] = {}
    if small:
        experiment, steps, settings, env = "mnist-small", 60, TINY, NO_FIGURES
    where = ("--runs-dir", runs.absolute(), "--device", device, "--cluster", "local")
    # A line every 5 steps, because the interruption waits for one.
    train = ("train", experiment, "--train.steps", steps, *settings, "--train.log-every", 5, "--name", NAME, *where)
    run, at = runs / experiment / NAME, steps // 3
    started = time.perf_counter()
    code = interrupted(train, RunFolder(run), at, env)
    state = json.loads((run / "status.json").read_text())
    if (code, state["state"]) != (130, "interrupted"):
        raise RuntimeError(f"Ctrl-C must end the training with code 130, interrupted; got {code}, {state['state']}")
    yield limit(
        f"`train {experiment}`, Ctrl-C after {at:,} steps: saved at step {state['step']:,}, exit code", "", [code], None
    )
    command(*train, cwd=Path(), **env)
    state = json.loads((run / "status.json").read_text())
    if (state["state"], state["step"]) != ("finished", steps):
        raise RuntimeError(f"the same command must finish the training; got {state}")
    yield limit(f"both commands, {steps:,} steps", "s", [time.perf_counter() - started], None)
    n = 64 if small else DIGITS
    seconds = command("sample", run, "--num-samples", n, "--name", NAME, *where, cwd=Path(), **env)
    yield limit(f"{n:,} digits, the whole command", "s", [seconds], None)
    with np.load(run / "samples" / NAME / "samples.npz") as arrays:
        distance, of_real = (frechet(arrays["arr_0"], experiment, real=real) for real in (False, True))
    yield limit(f"Frechet distance of {n:,} digits", "", [distance], None if small else FRECHET_AT_MOST)
    yield limit(f"that of {n:,} real digits", "", [of_real], None)


def interrupted(arguments: tuple[object, ...], run: RunFolder, step: int, env: dict[str, str]) -> int:
    """Runs `launch.py ARGUMENTS`, sends Ctrl-C once the run has logged that step; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *map(str, arguments)],
        env={**os.environ, "WANDB_MODE": "disabled", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and last_step(run.metrics) < step:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        return process.wait()
    finally:
        process.kill()
