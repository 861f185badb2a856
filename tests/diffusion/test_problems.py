"""A data set of images brings its own size; without a classifier it is judged by what needs none."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.mnist import MNIST
from diffusion.errors import UserError
from diffusion.images import evaluation
from diffusion.images.experiment import ImageExperiment
from diffusion.problems.images import ImageProblem
from diffusion.settings import DiffusionSettings, SamplerSettings, SettingsError, UnetSettings
from diffusion.statistics import flow
from diffusion.statistics.bootstrap import Estimate
from diffusion.statistics.evaluator import Drawn, Metric
from jobs.sample.draw import draw
from jobs.sample.sample_set import SampleSettings
from tests import made_images

MODEL, DIFFUSION = UnetSettings(dim=8, dim_mults=(1, 2), attn_heads=(1, 1)), DiffusionSettings(timesteps=21)
HEIGHT, WIDTH = 12, 20
CPU = torch.device("cpu")


@pytest.fixture
def problem(tmp_path: Path) -> ImageProblem:
    made = made_images.make(tmp_path, MNIST, HEIGHT, WIDTH)

    @dataclass(frozen=True, kw_only=True)
    class Blobs(ImageProblem):
        """Blobs."""

        root: str = str(tmp_path)
        data_set = made
        noun = "blobs"

    return Blobs()


def judged(problem: ImageProblem, samples: Any, model: Any) -> tuple[dict[str, Metric], dict[str, Any]]:
    """The metrics, and what else an evaluation tells."""
    drawn = Drawn(samples, model, SamplerSettings(sampler="dpm++", steps=4), likelihood=model is not None)
    evaluator = problem.evaluator(MODEL, DIFFUSION, drawn)
    results = {name: unit.compute() for name, unit in evaluator.units().items()}
    evaluator.draw(results, Path(problem.root))
    return evaluator.metrics(results), {**evaluator.tables(results), **evaluator.curves(results)}


@pytest.mark.usefixtures("coarse_figures")
def test_images_of_any_size_are_trained_drawn_and_judged(
    problem: ImageProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BOUND_IMAGES", 4)
    monkeypatch.setattr(flow, "IMAGE_STEPS", 2)
    torch.manual_seed(0)
    experiment = problem.build(MODEL, DIFFUSION)
    model = experiment.build_model()
    x0 = experiment.batch(0, 1, 0, 8, 8, CPU)
    assert x0.shape == (8, 1, HEIGHT, WIDTH)
    model(x0, torch.arange(8), torch.randn(x0.shape)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.requires_grad_(False).eval()
    settings = SampleSettings(1, "ema", "", SamplerSettings(sampler="ddim", steps=2), 0, "fp32", 4, 8)
    samples = experiment.to_array(draw(model.predict, model.alphas_cumprod, experiment, settings, 0, 100))
    assert (samples.dtype.name, samples.shape) == (problem.sample.dtype, (100, *problem.sample.shape))
    experiment.report(model, Path(problem.root))
    found, more = judged(problem, samples, model)
    assert list(found) == ["copies", "test_loss", "bits_per_dim", "flow_bits_model", "flow_bits_uniform"]
    assert "test blobs" in found["bits_per_dim"].label
    assert set(more) == {"bound", "bound_by_t"}


def test_images_may_have_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 16, 12, 3), dtype=np.uint8)
    experiment = ImageExperiment(
        lambda split: (colours, np.zeros(8, np.uint8)), (16, 12, 3), "colours", replace(MODEL, patch_size=2), DIFFUSION
    )
    x0 = experiment.batch(0, 1, 0, 8, 8, CPU)
    assert experiment.build_model()(x0, torch.arange(8), torch.randn(x0.shape)).shape == (8,)
    order = [experiment._index(0, i) for i in range(8)]
    assert np.array_equal(experiment.to_array(x0), colours[order])
    experiment.draw_samples(colours, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"


def test_copies_are_found_without_a_classifier(problem: ImageProblem) -> None:
    train, test = (problem.data_set.read_images(Path(problem.root), split) for split in ("train", "test"))
    for samples, share in ((train[:100], 1.0), (test, 0.0)):
        (copies,) = judged(problem, samples, None)[0].values()
        assert copies.value == pytest.approx(share, abs=0.02)
        assert isinstance(copies.floor, Estimate)
        assert copies.floor.value == pytest.approx(0.01, abs=0.01)
    assert "There is no classifier of blobs here" in problem.remark


def test_the_network_must_fit_the_images(problem: ImageProblem) -> None:
    problem.check(UnetSettings(dim_mults=(1, 2, 4)))
    with pytest.raises(SettingsError, match=r"model\.dim-mults halves 12x20 once for each entry after the first"):
        problem.check(UnetSettings(dim_mults=(1, 2, 4, 8)))
    with pytest.raises(SettingsError, match=r"model\.dim-mults halves 6x10 once"):
        problem.check(UnetSettings(dim_mults=(1, 2, 4), patch_size=2))


def test_results_rest_on_the_files_and_on_no_classifier(problem: ImageProblem) -> None:
    assert problem.digest(inception=False).keys() == {"data"}
    flipped = np.frombuffer(np.random.default_rng(0).bytes(4), np.uint8)
    path = problem.data_set.raw_folder(Path(problem.root)) / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-4] + flipped.tobytes())
    with pytest.raises(UserError, match="sha256"):
        problem.prepare(print)
