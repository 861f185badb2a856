"""What an experiment does with a model works wherever the model is, and gives what it gives on the CPU."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.images import evaluation
from diffusion.problems.images import ImageProblem
from diffusion.problems.own_images import OwnImagesProblem
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.settings import (
    SAMPLERS,
    ClassMlpSettings,
    ClassUnetSettings,
    DiffusionSettings,
    MlpSettings,
    SamplerSettings,
    UnetSettings,
)
from diffusion.statistics.evaluator import Drawn
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.table import EXPERIMENTS
from jobs.sample.draw import draw
from jobs.sample.sample_set import SampleSettings
from tests import made_images
from tests.elsewhere import DEVICE, Elsewhere, elsewhere, move

SMALL = {
    "1d": {"model": MlpSettings(dim=8, layers=1)},
    "1d-classes": {"model": ClassMlpSettings(dim=8, layers=1)},
    "mnist": {"model": UnetSettings(dim=8, dim_mults=(1, 2), attn_heads=(1, 1))},
    "mnist-small": {"model": UnetSettings(dim=8, dim_mults=(1,), attn_heads=(1,), noise_skip=True, patch_size=2)},
}
SMALL["mnist-classes"] = {"model": ClassUnetSettings(dim=8, dim_mults=(1, 2))}
SMALL["mnist-classes-small"] = {"model": ClassUnetSettings(dim=8, dim_mults=(1,), noise_skip=True, patch_size=2)}
SMALL["fashion-mnist-small"] = SMALL["mnist-small"]


NAMES = [name for name, entry in EXPERIMENTS.items() if not isinstance(entry.preset.data, OwnImagesProblem)]
OF_EACH_NETWORK = list({type(EXPERIMENTS[name].preset.model): name for name in NAMES}.values())
"""One experiment of each kind of network: what figures depend on, which take most of the time here."""


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """Each experiment of the table, with a small network, few timesteps and small images."""
    preset = EXPERIMENTS[request.param].preset
    changes: dict[str, Any] = {**SMALL[request.param], "diffusion": DiffusionSettings(timesteps=21)}
    if isinstance(preset.data, ImageProblem):
        root = tmp_path / "data"
        monkeypatch.setattr(type(preset.data), "data_set", made_images.make(root, preset.data.data_set, 8, 8))
        changes["data"] = dataclasses.replace(preset.data, root=str(root))
    return dataclasses.replace(preset, **changes)


def both(config: ExperimentConfig, act: Callable[[Experiment, DiffusionModel], Any]) -> tuple[Any, Any]:
    """What `act` gives for a model on the CPU, and for the same one elsewhere."""
    found = []
    for there in (False, True):
        torch.manual_seed(0)
        experiment = config.build()
        model = experiment.build_model().eval()
        if there:
            move(model)
            with elsewhere():
                found.append(act(experiment, model))
        else:
            found.append(act(experiment, model))
    return found[0], found[1]


def test_the_device_of_these_tests_is_as_strict_as_a_gpu() -> None:
    here = torch.ones(3)
    with elsewhere():
        there = here.to(DEVICE)
        assert there.device == DEVICE
        assert (there + 1).device == DEVICE
        assert torch.zeros(2, device=DEVICE).device == DEVICE
        assert isinstance(there * 2, Elsewhere)
        assert (there * 2).cpu().tolist() == [2, 2, 2]
        for meet in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here @ there):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()


@pytest.mark.parametrize("config", OF_EACH_NETWORK, indirect=True)
@pytest.mark.parametrize("name", ["report", "sketch"])
@pytest.mark.usefixtures("coarse_figures")
def test_figures_and_final_numbers(
    name: str, config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Gaussian1d._draw
    monkeypatch.setattr(Gaussian1d, "_draw", lambda self, predict, n: drawn(self, predict, min(n, 1000)))

    def act(experiment: Experiment, model: DiffusionModel) -> Any:
        folder = tmp_path / model.alphas_cumprod.device.type
        folder.mkdir()
        lines = experiment.report(model, folder) if name == "report" else experiment.sketch(model, folder)
        return lines, {path.name: path.read_bytes() for path in folder.iterdir()}

    here, there = both(config, act)
    assert here == there
    assert here[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples(sampler: Any, config: ExperimentConfig) -> None:
    told = ((1, 0), 2.0) if config.num_classes else ()
    settings = SampleSettings(1, "ema", "", SamplerSettings(sampler=sampler, steps=4, eta=0.5), 0, "fp32", 4, 8, *told)

    def act(experiment: Experiment, model: DiffusionModel) -> Any:
        with torch.inference_mode():
            x0 = draw(model.predict, model.alphas_cumprod, experiment, settings, 0, 4)
        assert x0.device == model.alphas_cumprod.device
        return experiment.to_array(x0)

    here, there = both(config, act)
    np.testing.assert_array_equal(here, there)


def test_evaluation_of_the_weights(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units that depend on the weights; those of the samples alone have no model."""
    monkeypatch.setattr(evaluation, "BOUND_CHUNK", 2)  # digits in a unit, one after the other
    sample = config.data.sample
    samples = np.zeros((max(100, sample.fewest), *sample.shape), dtype=sample.dtype)

    def act(experiment: Experiment, model: DiffusionModel) -> Any:
        drawn = Drawn(samples, model, SamplerSettings(sampler="dpm++", steps=4))
        units = config.evaluator(drawn).units()
        names = [name for name in units if name.startswith(("sampler-dpm++-4", "likelihood-0", "excess", "bound-0"))]
        assert names
        return {name: {key: value.tolist() for key, value in units[name].compute().items()} for name in names}

    here, there = both(config, act)
    assert json.dumps(here) == json.dumps(there)


def test_a_batch_and_its_loss(config: ExperimentConfig) -> None:
    def act(experiment: Experiment, model: DiffusionModel) -> Any:
        device = model.alphas_cumprod.device
        x0 = experiment.batch(0, 1, 0, 4, 4, device)
        t, eps = torch.arange(4).to(device), torch.linspace(-1, 1, x0.numel()).reshape(x0.shape).to(device)
        told = [torch.from_numpy(classes).to(device) for classes in experiment.told(0, 1, 0, 4, 4)]
        with torch.no_grad():  # a backward pass would ask CUDA itself for a thread
            return model(x0, t, eps, *told).cpu().tolist()

    here, there = both(config, act)
    assert here == there
