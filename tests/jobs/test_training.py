"""An update against the same one written with torch alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion.settings import MlpSettings
from jobs.ema import decay_at
from jobs.experiments import EXPERIMENTS
from jobs.training import Training, lr_at
from jobs.world import start

STEPS = 4


@pytest.mark.parametrize("micro_batch_size", [None, 24])
@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_an_update_is_that_of_plain_torch(max_grad_norm: float, micro_batch_size: int | None) -> None:
    preset = EXPERIMENTS["1d"].preset
    settings = replace(
        preset.train,
        batch_size=64,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        micro_batch_size=micro_batch_size,
    )
    experiment = replace(preset, model=MlpSettings(dim=16)).build()
    training = Training(experiment, settings, start(1, "cpu", "fp32"))

    model = copy.deepcopy(training.raw)
    average = copy.deepcopy(model.network)
    betas = (0.9, settings.beta2)
    optimizer = torch.optim.AdamW(model.network.parameters(), betas=betas, weight_decay=settings.weight_decay)
    for step in range(1, STEPS + 1):
        loss = model(*training.examples(step)).mean()
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


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine() -> None:
    settings = replace(EXPERIMENTS["1d"].preset.train, lr=2.0, warmup_steps=4, steps=13)
    assert [lr_at(step, settings) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]
    falling = [1 + math.cos(math.pi * tenth / 10) for tenth in range(1, 10)]  # it would be 0 at step 14
    assert [lr_at(step, settings) for step in range(5, 14)] == pytest.approx(falling, rel=1e-12)


def test_the_average_forgets_its_beginning_and_then_remembers_as_long_as_it_is_told() -> None:
    assert [decay_at(step, 0.99) for step in (1, 8, 90)] == [2 / 11, 0.5, 0.91]
    assert decay_at(10_000, 0.99) == 0.99
