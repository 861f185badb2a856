"""A step that is captured once and given to a GPU in one launch computes the bytes of one launched piece by piece."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusion.process.cuda_graphs import in_one_launch
from diffusion.process.guidance import autoguided
from jobs.experiments.table import EXPERIMENTS
from jobs.runtime.compiling import compiled_at_first
from jobs.runtime.numerics import Kind, Precision, set_numerics
from jobs.runtime.world import World, start
from jobs.sample import draw
from jobs.storage.checkpoints import Snapshot
from jobs.train.state import Training
from tests.gpu import jobs
from tests.gpu.conftest import VARIABLE

STEPS, POISONED, SAVED = (5, 2, 3) if os.environ.get(VARIABLE) == "cpu" else (12, 4, 7)


def training(experiment: str, device: Kind, mnist_root: Path, world: World) -> Training:
    """A new one, whose step `POISONED` has a gradient that is not finite."""
    if experiment == "mnist":
        found = jobs.training(device, mnist_root, world)
    else:
        preset = EXPERIMENTS[experiment].preset
        levels = (0.1, 0.9)  # so that the weights of timesteps differ
        found = Training(
            preset.build(), replace(preset.train, warmup_steps=2, grad_shards=4, noise_levels=levels), world
        )
    right = found.experiment.batch

    def batch(seed: int, step: int, *rest: object) -> torch.Tensor:
        drawn = right(seed, step, *rest)  # type: ignore[arg-type]
        return drawn * math.nan if step == POISONED else drawn

    found.experiment.batch = batch  # type: ignore[method-assign, assignment]
    return found


def advanced(found: Training, to: int, *, captured: bool) -> tuple[list[tuple[bool, float]], Snapshot]:
    """What the steps up to `to` reported, and the state after them; a CPU, which captures nothing, rehearses."""
    if captured and found.world.device.type == "cuda":
        found.capture()
    reported = []
    while found.step < to:
        update = found.update()
        reported.append((update.skipped, float(update.loss)))
    return reported, found.snapshot()


def tensors(snapshot: Snapshot) -> list[torch.Tensor]:
    moments = [value for state in snapshot.optimizer["state"].values() for value in state.values()]  # type: ignore[attr-defined]
    return [*snapshot.model.values(), *snapshot.ema.values(), *moments]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("experiment", ["1d", "1d-classes", "mnist"])
def test_a_captured_step_is_the_step(experiment: str, precision: Precision, device: Kind, mnist_root: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # else it would stay at the precision of the test before
    world = start(1, device, precision)
    reported, expected = advanced(training(experiment, device, mnist_root, world), STEPS, captured=False)
    assert [skipped for skipped, _ in reported] == [step == POISONED for step in range(1, STEPS + 1)]

    whole, found = advanced(training(experiment, device, mnist_root, world), STEPS, captured=True)
    _, saved = advanced(training(experiment, device, mnist_root, world), SAVED, captured=True)
    resumed = training(experiment, device, mnist_root, world)
    resumed.restore(saved)
    rest, continued = advanced(resumed, STEPS, captured=True)

    assert str(whole) == str(reported) and str(rest) == str(reported[SAVED:])  # NaN is not equal to itself
    for one, other, third in zip(tensors(expected), tensors(found), tensors(continued), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("experiment", ["mnist", "mnist-classes"])
def test_captured_predictions_are_the_predictions(experiment: str, device: Kind) -> None:
    """Those of figures, which ask for many of one shape, from tensors of the host."""
    preset = EXPERIMENTS[experiment].preset
    small = replace(preset, model=replace(preset.model, dim=jobs.dim(device)))  # type: ignore[call-arg]
    model = small.build().build_model().to(device).eval()
    xt, told = torch.randn(8, 1, 28, 28), [torch.arange(8) % 10] if model.num_classes else []
    with torch.inference_mode():
        often = model.predict_often()
        for t in (torch.full((8,), 900), torch.arange(8)):
            found = often(xt, t, *told)
            assert found.device == xt.device and torch.equal(found, model.predict_for(xt, t, *told))


def test_guided_predictions_are_those_of_both_networks_captured_or_not(device: Kind) -> None:
    preset = EXPERIMENTS["1d"].preset
    strong, weak = (preset.build().build_model().to(device).eval() for _ in range(2))
    evaluate = draw.evaluation(strong, (weak, 2.0), False, device, pytest.fail)
    with torch.inference_mode():
        for t in (900, 3):
            inputs = torch.randn(8, 1, device=device), torch.full((8,), t, device=device)
            assert torch.equal(evaluate(*inputs), autoguided(strong.predict, weak.predict, 2.0)(*inputs))


def test_compiled_predictions_are_the_predictions_captured_or_not(device: Kind) -> None:
    """Those of a sampling job, up to the rounding of another order of summation; with classes it has all layers."""
    preset = EXPERIMENTS["mnist-classes"].preset
    levels = (1, 2, 4) if device == "cuda" else (1,)  # each takes Inductor ten seconds on a CPU
    small = replace(preset.model, dim=jobs.dim(device), dim_mults=levels)  # type: ignore[call-arg]
    model = replace(preset, model=small).build().build_model().to(device).eval()
    set_numerics("bf16")
    inputs = [torch.randn(8, 1, 28, 28, device=device), *torch.arange(8, device=device).expand(2, 8)]
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        expected = model.predict(*inputs)
        compiled = compiled_at_first([model.network], model.predict, lambda seconds: None)
        found = compiled(*inputs)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        assert torch.equal(compiled(*inputs), found)
        if device == "cuda":
            assert torch.equal(in_one_launch(compiled, pytest.fail)(*inputs), found)
