"""The training job: from a run folder to a trained model, through as many interruptions as come."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from diffusion.errors import UserError
from diffusion.process.cuda_graphs import not_captured
from jobs.experiments.settings import TrainSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.followers.start import machine_of
from jobs.health import gpu_test
from jobs.health.watchdog import COMPILING, END, FIGURES, HELD_OUT, SAVING, START, Watchdog
from jobs.runtime.job import JobError, MachineError, Requeue, process_node
from jobs.runtime.numerics import (
    Kind,
    differing,
    facts,
    lacking,
    mixed,
    resolve_precision,
    shared,
    uuid_of,
    whereabouts,
)
from jobs.runtime.signals import SignalWatch, Stop
from jobs.runtime.world import start
from jobs.storage import checkpoints
from jobs.storage.ownership import Ownership
from jobs.storage.records import last_start, precision_of, read_jsonl, starts
from jobs.storage.run_folder import RunFolder, State
from jobs.terminal.console import Console
from jobs.terminal.tables import duration
from jobs.train.ema import decay_at
from jobs.train.recorder import NodeRecorder, NoRecorder, Recorder, RunRecorder
from jobs.train.state import NotFinite, Training, Update

MAX_SKIPPED_IN_A_ROW = 5
COMPILING_PAYS = 10_000
"""Steps of a run that a GPU compiles by itself: with `mnist` a minute is won back after some 6,000."""


def train(
    run: RunFolder, processes: int, device: Kind, signals: SignalWatch, watchdog: Watchdog, requeue: Requeue | None
) -> int:
    """Trains the run to its last step, or to the step at which all processes agree to stop; returns the exit code."""
    experiment, config = run.read_experiment()
    settings = config.train
    before = last_start(run)
    precision = resolve_precision(precision_of(run, settings.precision, "auto"), device)
    # Another node may have what this one lacks: the run has been at work on one.
    unfit_here: type[JobError] = MachineError if before else JobError
    if unfit := lacking(precision, device):
        raise unfit_here(unfit)
    world = start(processes, device, precision)
    gpu_test.check(world.device)
    # Each process has asked its own hardware, and the nodes of a job may differ.
    if (first := world.of_first(precision)) != precision:
        raise unfit_here(
            f"{whereabouts()} computes in {precision}, the first process in {first}: name a --train.precision"
        )
    compiled = world.of_first(compiles(settings, device, starts(read_jsonl(run.timing))))
    console = Console(run.log)
    training = Training(config.build(), settings, world)
    step, owner = take_over(training, run, console)
    if step:
        training.restore(checkpoints.load(run.checkpoints, step))
    here = machine_of(world.of_all((process_node(), uuid_of(world.device))), world.rank)
    found = world.of_all(facts(world.device))
    recorder: Recorder = NodeRecorder(run, owner, here) if here is not None else NoRecorder()
    if world.rank == 0:
        assert here is not None
        machine = {
            "processes": processes,
            "nodes": here.nodes,
            "grad_shards": training.shards,
            "precision": precision,
            "compile": "always" if compiled else "never",
            "steps": settings.steps,
            "parameters": sum(p.numel() for p in training.raw.network.parameters()),
            **shared(found),
        }
        before = {"grad_shards": before.get("processes"), **before}  # as older versions cut the batch
        if step:
            say_of_bytes(console, differing(before, machine))
        if unlike := mixed(found):
            console.say(f"This run may have other bytes if it is interrupted: {'; '.join(unlike)}.")
        recorder = RunRecorder(run, training, owner, console, requeue is not None, machine, here)
    try:
        if world.rank == 0:
            advise(training, EXPERIMENTS[experiment].cpu_advice, console)
        recorder.start()
        if training.step < settings.steps:
            watchdog.phase("compiling", COMPILING)
            # Before the step is captured, because a captured one repeats the kernels that it was captured with.
            compile_s, was_stopped = compile_network(training, signals, console) if compiled else (None, False)
            if not was_stopped:
                if world.rank == 0 and step and compiled and compile_s is None:
                    say_of_bytes(console, differing(before, {"compile": "never"}))
                capture(training, console)
                recorder.begin(compile_s)
        watchdog.phase("the first step", START)
        reason = run_steps(training, recorder, signals, watchdog, settings.steps)
        if world.rank == 0:
            watchdog.phase("the last save", SAVING)
            recorder.save()
            watchdog.phase("figures and final numbers", FIGURES)
            if training.step == settings.steps:
                recorder.draw(lambda: signals.requested is not Stop.NO)
        watchdog.phase("the end", END)
        # All is saved. Whoever is told to end now may wait for a process that has died.
        is_safe = world.rank == 0 and training.step == settings.steps
        world.close(lambda: is_safe and signals.requested >= Stop.TERMINATE)
        return conclude(run, training, recorder, reason, requeue)
    except NotFinite as error:
        good = next(iter(checkpoints.steps(run.checkpoints)), "0, the beginning")
        raise NotFinite(f"{error}; the last good checkpoint is of step {good}") from None
    except UserError as error:  # of the data, which are read now
        owner.check()
        passing = isinstance(error.__cause__, OSError)
        raise (MachineError if passing else unfit_here)(str(error)) from error
    except Exception:
        # A process that fails because its run has been taken over must not mark the new job's run as failed.
        owner.check()
        raise
    finally:
        recorder.close()


def compiles(settings: TrainSettings, device: Kind, starts: Sequence[dict[str, Any]]) -> bool:
    """Whether a start compiles the network: as it was told to; else on GPUs alone, as the first there, if it pays."""
    if settings.compile != "auto":
        return settings.compile == "always"
    there = [start for start in starts if "compile" in start and str(start.get("device")).startswith("cuda")]
    if device != "cuda" or not there:
        return device == "cuda" and settings.steps >= COMPILING_PAYS
    # Who compiled twice and never came to a step nor to an orderly end may have died of it; nobody has asked for it.
    died = [start["step"] for start in there[-2:] if start["compile"] == "always" and "came_to" not in start]
    return there[-1]["compile"] == "always" and not (len(died) == 2 and died[0] == died[1])


def compile_network(training: Training, signals: SignalWatch, console: Console) -> tuple[float | None, bool]:
    """Compiles the network on all processes; returns the seconds that it took, and whether they were told to stop.

    If one of them cannot, that is a JobError where the settings ask for it; else all go on without, and None says so.
    It says nothing of the machine if one was told to stop: the signal may have killed the compilers.
    """
    seconds, failure = None, None
    try:
        seconds = training.compile()
    except JobError as error:
        failure = error
    reasons, stops = zip(*training.world.of_all((failure and str(failure), signals.requested)), strict=True)
    reason = next(filter(None, reasons), None)
    if reason is None:
        return seconds, False
    training.launch_uncompiled()
    if any(stops):
        return None, True
    if training.settings.compile == "always":
        raise failure or JobError(reason)
    if training.world.rank == 0:
        console.say(
            f"{reason[0].upper()}{reason[1:]}. The run goes on uncompiled, so its steps take longer; "
            "`resume` with --train.compile always tries it again."
        )
    return None, False


def say_of_bytes(console: Console, changed: list[str]) -> None:
    if changed:
        console.say(f"From here on bytes may differ from those of an uninterrupted run: {'; '.join(changed)}.")


def capture(training: Training, console: Console) -> None:
    """Captures the step as a CUDA graph where the settings ask for it; of themselves, for one GPU that trains alone."""
    world, asked = training.world, training.settings.cuda_graph
    if world.device.type != "cuda" or asked == "never" or (asked == "auto" and world.size > 1):
        return
    failure = None
    try:
        training.capture()
    except RuntimeError as error:
        failure = not_captured(error)
    failed = next(filter(None, world.of_all(failure)), None)
    if failed is not None and world.rank == 0:
        console.say(failed)


def run_steps(training: Training, recorder: Recorder, signals: SignalWatch, watchdog: Watchdog, last: int) -> Stop:
    """Runs steps up to the `last` one (returns Stop.NO), or until all processes agree on a reason to stop."""
    skipped_in_a_row = 0
    reason = max(training.world.of_all(signals.requested))  # a signal may have come before the first step
    while reason is Stop.NO and training.step < last:
        update = training.update(lambda: signals.requested)
        # On every process, though one alone records: the numbers of a line are sums over all processes.
        recorder.after_step(logged(training, update, watchdog))
        watchdog.step(training.step)
        skipped_in_a_row = skipped_in_a_row + 1 if update.skipped else 0
        if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NotFinite(
                f"the loss or its gradient was not finite in the {MAX_SKIPPED_IN_A_ROW} steps up to {training.step}; "
                "a new run with a smaller --train.lr may help"
            )
        reason = update.stop
    return reason if training.step < last else Stop.NO


def logged(training: Training, update: Update, watchdog: Watchdog) -> dict[str, Any] | None:
    """Returns the line of metrics.jsonl for this step, None for a step that is not logged."""
    settings, step = training.settings, training.step
    is_last = step == settings.steps
    held_out = settings.held_out_every > 0 and (step % settings.held_out_every == 0 or is_last)
    if not (step % settings.log_every == 0 or is_last or held_out or update.skipped):
        return None
    loss, *bands = training.sums(update)
    means = [s / n if n else math.nan for s, n in zip(*(values.tolist() for values in bands), strict=True)]
    values = {
        "loss": loss,
        **{f"loss_t{band}": value for band, value in enumerate(means)},
        "lr": update.lr,
        "grad_norm": update.grad_norm,
        "clipped": int(update.grad_norm > settings.max_grad_norm and not update.skipped),
        "ema_decay": decay_at(step, settings.ema_decay),
        "skipped": int(update.skipped),
    }
    if held_out:
        watchdog.between_steps("the held-out loss", HELD_OUT)
        values["held_out_loss"] = training.held_out.loss()
    # JSON has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def take_over(training: Training, run: RunFolder, console: Console) -> tuple[int, Ownership]:
    """Takes the run over; returns the step of its newest good checkpoint, 0 if there is none, and the new ownership.

    Only the first process does it; the others wait for the same answer. They get the token from it, not from the file:
    on a shared file system they may read the old token for a while, and would believe that they have been superseded.
    """
    step, token = 0, ""
    if training.world.rank == 0:
        # The token comes first: from now on an older job cannot write, so what is cleaned and read below stays so.
        owner = Ownership.take(run.path)
        token = owner.token
        run.clear_failure()
        checkpoints.clean(run.checkpoints)
        step = checkpoints.newest(run.checkpoints, console.say) or 0
        owner.check()  # to verify takes minutes on a slow disk, and a newer job may have saved newer ones meanwhile
        checkpoints.set_aside(run.checkpoints, newer_than=step)
        if step:
            console.say(f"Continuing {run} after step {step:,} of {training.settings.steps:,}.")
    step, token = training.world.of_first((step, token))
    return step, Ownership(run.path, token)


def conclude(run: RunFolder, training: Training, recorder: Recorder, reason: Stop, requeue: Requeue | None) -> int:
    """Says how the job ended, queues it again if it was told to make room, and returns the exit code."""
    step, steps = training.step, training.settings.steps
    if step == steps:
        recorder.finish(State.FINISHED, f"Finished {run} at step {step:,}; pictures are in {run}/figures.")
        return 0
    saved = f"Saved {run} at step {step:,} of {steps:,}."
    # Also after SIGTERM: if a job ends by itself within its grace time, Slurm does not queue it again.
    if requeue is not None and reason is not Stop.INTERRUPT and recorder.queue_again(requeue, saved):
        return 0
    state = State.CANCELLED if reason is Stop.TERMINATE else State.INTERRUPTED
    recorder.finish(state, f"{saved} Continue with: python launch.py resume {run}")
    return 130


def advise(training: Training, advice: str | None, console: Console) -> None:
    """Says how long a model that is sized for GPUs will take on this CPU, measured on a few examples."""
    if advice is None or training.world.device.type != "cpu":
        return
    few = [part[:16] for part in training.examples(1)]
    seconds = 0.0
    for _ in range(2):  # the first pass also allocates
        started = time.perf_counter()
        with torch.no_grad():
            training.raw(*few)
        seconds = 3 * (time.perf_counter() - started)  # the backward pass costs about twice the forward pass
    settings = training.settings
    images = (settings.steps - training.step) * settings.batch_size
    takes = duration(images / training.world.size * seconds / len(few[0]))
    console.say(advice.format(steps=settings.steps, batch_size=settings.batch_size, duration=takes))
