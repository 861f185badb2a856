"""The evaluation job: computes units of an evaluation, and merges them into its results when all are there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from diffusion.statistics.bootstrap import Estimate
from diffusion.statistics.evaluator import Drawn, Evaluator
from jobs.evaluate.plan import Evaluation, load_samples, write_arrays
from jobs.health.watchdog import UNIT, Watchdog
from jobs.runtime.numerics import Kind, own_device, set_numerics
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.runtime.surroundings import decorate
from jobs.sample.draw import load_model
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress


def open_evaluator(evaluation: Evaluation, device: Kind) -> Evaluator:
    """The experiment's evaluator."""
    samples = evaluation.samples
    run = RunFolder(samples.run)
    config, model = evaluation.config(), None
    # Always, because results of the weights are shared by sets that were drawn in any precision.
    set_numerics("fp32")
    if evaluation.protocol["weights_are_there"]:
        _, model = load_model(run, samples.settings, own_device(device))
        # The flow takes gradients by x alone; for those of weights, autograd would keep every layer's input.
        model.requires_grad_(False)
    classes = samples.settings.classes_of(0, samples.num_samples) if samples.settings.classes else None
    array, protocol = load_samples(samples, config.data.sample), evaluation.protocol
    asked = protocol["seed"], "inception" in protocol["sha256"], "likelihood" in protocol
    return config.evaluator(Drawn(array, model, samples.settings.sampler, classes, *asked))


@contextmanager
def stopping(signals: SignalWatch) -> Iterator[None]:
    """While entered, every network raises Stopped at its next call after a signal has come."""

    def check(module: nn.Module, inputs: Any) -> None:
        if signals.requested is not Stop.NO:
            raise Stopped

    # A unit takes minutes, but calls some network again and again: a hook on all of them stops it soon.
    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def evaluate(
    evaluation: Evaluation, evaluator: Evaluator, share: tuple[int, int], signals: SignalWatch, watchdog: Watchdog
) -> None:
    """Computes every n-th unit from the i-th on, for share = (i, n), except those that are done already.

    Raises Stopped when a signal has come.
    """
    mine = list(evaluator.units().items())[share[0] :: share[1]]
    progress = Progress(Console(None), "evaluate", len(mine), 0, "units", 1)
    for done, (name, unit) in enumerate(mine):
        if signals.requested is not Stop.NO:
            raise Stopped
        path = evaluation.result_path(name, unit.of)
        if not path.exists():
            watchdog.phase(f"unit {name}", UNIT)
            with stopping(signals):
                result = unit.compute()
            write_arrays(path, result)
        if share[0] == 0:
            progress.update(done + 1, name)
    progress.close()


def missing(evaluation: Evaluation, evaluator: Evaluator) -> list[str]:
    """Returns the units that nobody has computed yet."""
    units = evaluator.units().items()
    return [name for name, unit in units if not evaluation.result_path(name, unit.of).exists()]


def merge(evaluation: Evaluation, evaluator: Evaluator) -> None:
    """Writes metrics.json and the figures from the results of all units; a second merge writes the same bytes."""
    results = {}
    for name, unit in evaluator.units().items():
        with np.load(evaluation.result_path(name, unit.of), allow_pickle=False) as arrays:
            results[name] = dict(arrays)
    metrics = evaluator.metrics(results)
    evaluation.undrawn.touch()  # before the results, so that a merge that stops before the figures is not done
    evaluation.write(
        {
            "num_judged": evaluator.num_judged,
            "metrics": {name: metric.as_json() for name, metric in metrics.items()},
            "tables": {name: table._asdict() for name, table in evaluator.tables(results).items()},
            "curves": evaluator.curves(results),
        },
        {name: m.estimate.replicates for name, m in metrics.items() if isinstance(m.estimate, Estimate)},
    )
    if decorate("its figures", lambda: evaluator.draw(results, evaluation.folder), print) is None:
        evaluation.undrawn.unlink(missing_ok=True)  # another process may have merged, too
