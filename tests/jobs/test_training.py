"""An update against the same one written with torch alone."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.process.model import DiffusionModel
from diffusion.process.schedules import log_snr
from diffusion.settings import MlpSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.runtime.world import start
from jobs.train.ema import decay_at
from jobs.train.state import LOSS_BANDS, Training, band_sums, lr_at

STEPS = 4


@pytest.mark.parametrize("grad_shards", [None, 4])
@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
@pytest.mark.parametrize("noise_levels", [None, (-0.2, 0.9)])
def test_an_update_is_that_of_plain_torch(
    noise_levels: tuple[float, float] | None, max_grad_norm: float, grad_shards: int | None
) -> None:
    preset = EXPERIMENTS["1d"].preset
    settings = replace(
        preset.train,
        batch_size=64,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        grad_shards=grad_shards,
        noise_levels=noise_levels,
    )
    experiment = replace(preset, model=MlpSettings(dim=16)).build()
    training = Training(experiment, settings, start(1, "cpu", "fp32"))

    model = copy.deepcopy(training.raw)
    average = copy.deepcopy(model.network)
    betas = (0.9, settings.beta2)
    optimizer = torch.optim.AdamW(model.network.parameters(), betas=betas, weight_decay=settings.weight_decay)
    for step in range(1, STEPS + 1):
        x0, t, eps = training.examples(step)
        losses = model(x0, t, eps)
        loss = (losses if noise_levels is None else losses / model.alphas_cumprod[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.network.parameters(), max_grad_norm)
        assert (norm > max_grad_norm) == (max_grad_norm < 1)  # else the clipping is not tested
        optimizer.param_groups[0]["lr"] = lr_at(step, settings)
        optimizer.step()
        for slow, fast in zip(average.parameters(), model.network.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - decay_at(step, settings.ema_decay))

        update = training.update()
        assert float(update.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert update.grad_norm == pytest.approx(float(norm), rel=1e-5)
    torch.testing.assert_close(training.raw.network.state_dict(), model.network.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(training.ema.network.state_dict(), average.state_dict(), rtol=1e-4, atol=1e-6)


def test_the_losses_of_each_shard_are_added_up_alone() -> None:
    """Losses so different that each order of adding them up rounds differently."""
    preset = EXPERIMENTS["1d"].preset
    settings = replace(preset.train, batch_size=64, grad_shards=4)
    training = Training(preset.build(), settings, start(1, "cpu", "fp32"))
    losses = torch.exp(10 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    by_shard = torch.stack([shard.double().sum() for shard in losses.chunk(4)]).sum(0)
    assert by_shard != losses.double().sum()
    found, _, _ = training.sums(replace(training.update(), losses=losses))
    assert found == float(by_shard) / 64


@pytest.mark.parametrize("name", ["1d", "1d-classes"])
def test_the_held_out_loss_of_the_exact_network_is_the_smallest_that_any_can_have(name: str) -> None:
    """On draws that no training makes, at timesteps and with noise that are the same whatever the run's seed.

    A network that is told classes has the loss of training, which is far smaller than that of no class.
    """
    preset = EXPERIMENTS[name].preset
    experiment = preset.build()
    assert isinstance(experiment, Gaussian1d)
    training = Training(experiment, replace(preset.train, seed=7), start(1, "cpu", "fp32"))
    training.held_out._build = lambda: Exact(experiment)
    experiment.class_dropout = 0.0  # here all classes are told
    found, floor = training.held_out.loss(), experiment.loss_floor()
    assert found == pytest.approx(floor, rel=0.02)  # 8,192 draws
    other = Training(experiment, replace(preset.train, seed=8), training.world)
    other.held_out._build = training.held_out._build
    assert other.held_out.loss() == found


def test_the_held_out_loss_is_of_the_noise_levels_that_the_training_draws() -> None:
    preset, mean, std = EXPERIMENTS["1d"].preset, -0.2, 0.9
    experiment = preset.build()
    assert isinstance(experiment, Gaussian1d)
    training = Training(experiment, replace(preset.train, noise_levels=(mean, std)), start(1, "cpu", "fp32"))
    training.held_out._build = lambda: Exact(experiment)
    level = -log_snr(experiment.abar).double()  # ln(sigma / alpha) of each timestep
    density = torch.exp(-0.5 * ((level - mean) / std) ** 2) * torch.gradient(level)[0]
    share = 0.9 * density / density.sum() + 0.1 / len(level)
    floors = experiment.mixture.loss_floor(experiment.abar) / experiment.abar  # of v
    exact = float((share * floors).sum())
    assert training.held_out.loss() == pytest.approx(exact, rel=0.06)  # 8,192 draws, which vary by 2%
    assert training.loss_floor() is None  # it is that of eps with all timesteps alike


class Exact(DiffusionModel):
    """The best possible network."""

    def __init__(self, experiment: Gaussian1d) -> None:
        super().__init__(nn.Identity(), experiment.abar, experiment.num_classes)
        self.exact = experiment

    def predict(self, xt: torch.Tensor, t: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        return self.exact.exact_predict(xt, t, classes)


def test_the_held_out_loss_is_that_of_the_averaged_weights_as_they_are_now() -> None:
    preset = EXPERIMENTS["1d"].preset
    training = Training(preset.build(), replace(preset.train, batch_size=64), start(1, "cpu", "fp32"))
    first = training.held_out.loss()
    assert training.held_out.loss() == first
    for _ in range(3):
        training.update()
    moved = training.held_out.loss()
    assert moved != first
    again = Training(preset.build(), replace(preset.train, batch_size=64), training.world)
    again.restore(training.snapshot())
    assert again.held_out.loss() == moved
    with torch.no_grad():
        for weights in training.raw.network.parameters():
            weights.zero_()
    assert training.held_out.loss() == moved


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine() -> None:
    settings = replace(EXPERIMENTS["1d"].preset.train, lr=2.0, warmup_steps=4, steps=13)
    assert [lr_at(step, settings) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]
    falling = [1 + math.cos(math.pi * tenth / 10) for tenth in range(1, 10)]  # it would be 0 at step 14
    assert [lr_at(step, settings) for step in range(5, 14)] == pytest.approx(falling, rel=1e-12)


def test_the_average_forgets_its_beginning_and_then_remembers_as_long_as_it_is_told() -> None:
    assert [decay_at(step, 0.99) for step in (1, 8, 90)] == [2 / 11, 0.5, 0.91]
    assert decay_at(10_000, 0.99) == 0.99


def test_a_try_of_a_step_that_fails_halfway_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a warm-up for a CUDA graph, or for the compiler, whose second shard finds no memory."""
    preset = EXPERIMENTS["1d"].preset
    settings = replace(preset.train, batch_size=64, grad_shards=4)
    experiment = replace(preset, model=MlpSettings(dim=16)).build()
    world = start(1, "cpu", "fp32")
    undisturbed, tried = Training(experiment, settings, world), Training(experiment, settings, world)
    passes = iter([tried._pass])

    def failing(*arguments: Any, **flags: Any) -> torch.Tensor:
        for right in passes:
            return right(*arguments, **flags)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(tried, "_pass", failing)
        with pytest.raises(RuntimeError, match="out of memory"), tried._without_moving() as examples:
            tried._advance(*examples)
    for _ in range(2):
        assert float(tried.update().loss) == float(undisturbed.update().loss)
    torch.testing.assert_close(tried.snapshot().ema, undisturbed.snapshot().ema, rtol=0, atol=0)
    torch.testing.assert_close(tried.snapshot().model, undisturbed.snapshot().model, rtol=0, atol=0)


def test_a_try_of_a_step_moves_nothing() -> None:
    preset = EXPERIMENTS["1d"].preset
    training = Training(preset.build(), replace(preset.train, batch_size=64), start(1, "cpu", "fp32"))
    training.update()
    before = training.snapshot()
    with training._without_moving() as examples:
        training._advance(*examples)
    after = training.snapshot()
    for kept, found in ((before.model, after.model), (before.ema, after.ema)):
        torch.testing.assert_close(found, kept, rtol=0, atol=0)
    torch.testing.assert_close(after.optimizer["state"], before.optimizer["state"], rtol=0, atol=0)


def test_loss_by_timestep_is_the_mean_over_the_examples_of_each_band() -> None:
    losses, t = torch.rand(100), torch.randint(0, 750, (100,))  # none in the last band
    losses[0], t[0] = torch.nan, 10
    sums, counts = band_sums(losses, t, 1000)
    assert counts.sum() == 100
    assert counts[-1] == 0
    assert torch.isnan(sums[0])  # and in no other band
    for band in range(1, LOSS_BANDS - 1):
        inside = losses[(t >= 250 * band) & (t < 250 * (band + 1))]
        assert float(sums[band]) == pytest.approx(float(inside.double().sum()), rel=1e-12)
        assert counts[band] == len(inside)
