"""Judges one checkpoint of a training that goes on: `python -m jobs.evaluate.beside RUN TOKEN STEP`.

It draws 1,000 samples with the averaged weights, on one core and never on a GPU, adds a line to quality.jsonl and ends.
If the training ends before, so does it, at once.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.storage import checkpoints
from jobs.storage.ownership import Ownership, Superseded
from jobs.storage.records import append, read_jsonl
from jobs.storage.run_folder import RunFolder

NUM_SAMPLES = 1000
MOST_EVALUATIONS = 20
"""Network evaluations for each sample, fewer where the experiment's own sampler takes fewer."""
CROWDED = 0.9
"""A process that computes gets this share of a core, or less, where all cores train."""
REST = 2
"""It rests so many times as long as it took: a step of the training must not take 2% longer."""
LONGEST_REST_S = 60.0
"""It may have been stopped for hours."""


def judge(run: RunFolder, step: int) -> dict[str, Any]:
    """Draws and judges samples of a checkpoint, and returns the line of quality.jsonl."""
    # Here, because they take seconds, in which this process must have its low priority.
    import torch

    from diffusion.statistics.evaluator import Drawn
    from jobs.evaluate.plan import SEED
    from jobs.experiments.table import EXPERIMENTS
    from jobs.runtime.numerics import computes_bf16, set_numerics
    from jobs.sample import sample_set
    from jobs.sample.draw import draw, load_model

    torch.set_num_threads(1)
    name, config = run.read_experiment()
    sampler = EXPERIMENTS[name].sampler
    sampler = replace(sampler, steps=min(sampler.steps, MOST_EVALUATIONS, config.diffusion.timesteps))
    first = next(iter(read_jsonl(run.quality)), {})
    sampler = sample_set.sampler_of(first) or sampler  # the experiment may have had another when the run began
    settings = sample_set.choose(run, seed=SEED, sampler=sampler, weights="ema", checkpoint=step, autoguided=1, say=say)
    bf16 = settings.precision == "bf16" and computes_bf16()  # a CPU that only imitates it would take hours
    settings = replace(settings, precision="bf16" if bf16 else "fp32")
    set_numerics(settings.precision)
    experiment, model = load_model(run, settings, torch.device("cpu"))
    firsts = range(0, NUM_SAMPLES, size := settings.sub_batch_size)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        abar = model.alphas_cumprod
        predict = unhurried(model.predict)
        parts = [draw(predict, abar, experiment, settings, first, first + size) for first in firsts]
    classes = settings.classes_of(0, NUM_SAMPLES) if settings.classes else None
    drawn = Drawn(experiment.to_array(torch.cat(parts)[:NUM_SAMPLES]), None, sampler, classes, SEED)
    found = config.evaluator(drawn).glance()
    return {
        "num_samples": NUM_SAMPLES,
        **settings.as_json(),
        "metrics": {metric: number.as_json() for metric, number in found.items()},
    }


def unhurried(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which rests after a call for `REST` times as long as it took, if others wanted its core.

    Also with time that nobody else uses it takes memory bandwidth and cache from the training on the other cores.
    """

    def rests(*arguments: Any) -> Any:
        began, used = time.monotonic(), time.thread_time()
        found = evaluate(*arguments)
        took = time.monotonic() - began
        if time.thread_time() - used < CROWDED * took:
            time.sleep(min(REST * took, LONGEST_REST_S))
        return found

    return rests


def say(text: str) -> None:
    """Prints what the training relays to its terminal and log."""
    with contextlib.suppress(OSError):  # the training may be gone
        print(text, flush=True)


def _end_with_the_training() -> None:
    """Waits for the end of stdin, which the training keeps open as long as it lives."""
    while os.read(0, 1):
        pass
    os._exit(0)


def give_way() -> None:
    """Gives this process the lowest priority: it gets what the training leaves of the cores and of the memory."""
    os.nice(19)
    with contextlib.suppress(OSError):  # behind all others, also at the moment when one of their threads wakes up
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # if memory runs out, the training must not be what the kernel kills
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError):  # where Linux shares cores among sessions, this counts, and not the line before
        Path("/proc/self/autogroup").write_text("19")


def main() -> None:
    run, owner, step = RunFolder(Path(sys.argv[1])), Ownership(Path(sys.argv[1]), sys.argv[2]), int(sys.argv[3])
    give_way()
    threading.Thread(target=_end_with_the_training, daemon=True).start()
    try:
        line = judge(run, step)
        owner.check()
        append(run.quality, line)
    except Superseded:
        return
    except Exception as error:
        reason = str(error) if step in checkpoints.steps(run.checkpoints) else "its checkpoint is not kept any more"
        say(f"WARNING: step {step:,} was not judged: {reason}")
    os._exit(0)  # else it would end in its own time, which may be long at the lowest priority


if __name__ == "__main__":
    main()
