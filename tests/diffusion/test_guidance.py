"""Classes and guidance against the exact guided ODE, exact losses, and denoising-diffusion-pytorch."""

import math

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.gaussian1d.distances import excess_loss, wasserstein1, wasserstein1_floor
from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.images.experiment import ImageExperiment
from diffusion.process.guidance import autoguided, guided, of_class
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import FUNCTIONS, Denoiser, Predict
from diffusion.process.schedules import alphas_cumprod_at
from diffusion.settings import ClassMlpSettings, ClassUnetSettings, DiffusionSettings, MixtureSettings

MIXTURE = MixtureSettings(means=(-2.0, 0.0, 2.0), stds=(0.3, 0.5, 0.4), weights=(0.3, 0.4, 0.3))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exact() -> Gaussian1d:
    return Gaussian1d(MIXTURE, ClassMlpSettings(dim=16, layers=1), DiffusionSettings())


def guided_ode(exact: Gaussian1d, k: int, guidance: float, x_t: np.ndarray) -> np.ndarray:
    """The end of dy / ds = eps, y = x / alpha, s = sigma / alpha, to eight digits, by scipy and from the densities.

    The score of p(x) (p(k | x))^S is that of the mixture plus S times that of p(k | x): Bayes' rule, and no formula of
    the guidance under test.
    """
    means, stds, weights = (np.array(values) for values in (MIXTURE.means, MIXTURE.stds, MIXTURE.weights))

    def slope(s: float, y: np.ndarray) -> np.ndarray:
        alpha2 = 1 / (1 + s**2)
        x, v = y[:, None] * alpha2**0.5, alpha2 * stds**2 + 1 - alpha2
        z = (x - alpha2**0.5 * means) / v
        joint = weights * np.exp(-z * z * v / 2) / v**0.5
        score = -(joint * z).sum(1) / joint.sum(1)
        score_of_class_given_x = -z[:, k] - score
        return np.asarray(-((1 - alpha2) ** 0.5) * (score + guidance * score_of_class_given_x))

    abar = float(exact.abar[-1])
    start = ((1 - abar) / abar) ** 0.5
    solution = solve_ivp(slope, (start, 0), x_t / abar**0.5, method="DOP853", rtol=1e-9, atol=1e-9)
    return np.asarray(solution.y[:, -1])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(
    ("name", "steps", "largest"), [("ddim", 400, 0.02), ("dpm++", 100, 0.003), ("heun", 101, 0.008)]
)
def test_samplers_reach_the_end_of_the_exact_guided_ode(
    name: str, steps: int, largest: float, guidance: float, exact: Gaussian1d
) -> None:
    x_t = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    for k in (0, 1):
        predict = guided(exact.exact_predict, torch.full((200,), k), 3, guidance)
        *_, x0 = FUNCTIONS[name](Denoiser(predict, exact.abar), x_t[:, None], steps=steps, noise=torch.randn)
        error = np.abs(x0[:, 0].numpy() - guided_ode(exact, k, guidance, x_t.numpy())).mean()
        assert error < largest


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
@pytest.mark.parametrize(("name", "steps", "largest"), [("ddim", 400, 5e-3), ("dpm++", 100, 5e-4), ("heun", 101, 5e-3)])
def test_samplers_reach_the_end_of_the_exact_autoguided_ode(
    name: str, steps: int, largest: float, scale: float, exact: Gaussian1d
) -> None:
    """Of two Gaussians with variances v and w, dy / ds is y s (S / (v + s^2) + (1 - S) / (w + s^2)): a closed form."""
    v, w = 0.25, 1.0  # the weak one is broader

    def of(variance: float) -> Predict:
        def eps(xt: Tensor, t: Tensor) -> Tensor:
            abar = alphas_cumprod_at(exact.abar, t).view(-1, 1)
            return (1 - abar).sqrt() * xt / (abar * variance + 1 - abar)

        return eps

    x_t = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    predict = autoguided(of(v), of(w), scale)
    *_, x0 = FUNCTIONS[name](Denoiser(predict, exact.abar), x_t[:, None], steps=steps, noise=torch.randn)
    abar = float(exact.abar[-1])
    s2 = (1 - abar) / abar
    shrunk = (v / (v + s2)) ** (scale / 2) * (w / (w + s2)) ** ((1 - scale) / 2)
    assert (x0[:, 0] - shrunk * x_t / abar**0.5).abs().mean() < largest


def test_guidance_of_one_draws_the_component_and_of_none_the_mixture(exact: Gaussian1d) -> None:
    n = 10_000
    x_t = torch.from_numpy(normal(0, Stream.SAMPLE_START, 0, 0, n, (1,)))
    for k, target in enumerate((*exact.components, exact.mixture)):
        for guidance in (1.0, 0.0) if k == 3 else (1.0,):
            predict = of_class(exact.exact_predict, k, 3, guidance)
            *_, x0 = FUNCTIONS["dpm++"](Denoiser(predict, exact.abar), x_t, steps=50, noise=torch.randn)
            assert wasserstein1(x0[:, 0], target) < 2.5 * wasserstein1_floor(target, n)


def test_both_predictions_go_through_the_network_in_one_batch() -> None:
    seen = []

    def predict(xt: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        seen.append((xt, t, classes))
        return classes.to(xt.dtype)[:, None].expand_as(xt)

    xt, t = torch.randn(3, 2), torch.tensor([5, 6, 7])
    for guidance, number in ((3.0, 6), (1.0, 3), (0.0, 3)):
        eps = guided(predict, torch.tensor([0, 2, 1]), 9, guidance)(xt, t)
        assert len(seen.pop()[0]) == number and not seen
        assert torch.equal(eps[:, 0], 9 + guidance * (torch.tensor([0.0, 2.0, 1.0]) - 9))


def test_the_floor_of_the_loss_is_the_loss_of_the_exact_model(exact: Gaussian1d) -> None:
    """Over classes as training tells them, some of them left out."""
    n, seed = 100_000, 3
    x0 = exact.batch(seed, 1, 0, n, n, CPU).double()
    (classes,) = map(torch.from_numpy, exact.told(seed, 1, 0, n, n))
    eps = torch.from_numpy(normal(seed, Stream.NOISE, 1, 0, n, (1,))).double()
    t = torch.arange(n) % len(exact.abar)
    abar = exact.abar[t][:, None]
    predicted = exact.exact_predict(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, classes)
    losses = (predicted - eps).square()
    assert exact.loss_floor() == pytest.approx(float(losses.mean()), abs=4 * float(losses.std()) / n**0.5)
    assert exact.loss_floor() < 0.9 * float(exact.mixture.loss_floor(exact.abar).mean())


def test_classes_are_left_out_by_counter_and_as_often_as_asked(exact: Gaussian1d) -> None:
    n = 20_000
    ((whole,), true) = exact.told(7, 5, 0, n, n), exact.classes(7, 5, 0, n, n)
    dropped = whole == 3
    assert dropped.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / n))
    assert np.array_equal(whole[~dropped], true[~dropped])
    assert np.array_equal(exact.told(7, 5, 300, 900, n)[0], whole[300:900])
    (other,) = exact.told(7, 6, 0, n, n)
    assert (dropped & (other == 3)).mean() == pytest.approx(0.01, abs=0.005)
    assert dropped[true == 1].mean() == pytest.approx(0.1, abs=0.02)
    # A component's samples lie where it does.
    x0 = exact.batch(7, 5, 0, n, n, CPU)[:, 0]
    for k, component in enumerate(exact.components):
        assert wasserstein1(x0[true == k], component) < 3 * wasserstein1_floor(component, int((true == k).sum()))


def test_a_network_learns_its_classes_and_the_mixture(exact: Gaussian1d) -> None:
    """In a moment: to the optimum of each class, and of none, nothing comes nearer than what it predicts for it."""
    torch.manual_seed(0)
    model = Gaussian1d(MIXTURE, ClassMlpSettings(dim=32, layers=2), DiffusionSettings()).build_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(1, 301):
        n = 512
        x0, (classes,) = exact.batch(0, step, 0, n, n, CPU), map(torch.from_numpy, exact.told(0, step, 0, n, n))
        eps, t = torch.from_numpy(normal(0, Stream.NOISE, step, 0, n, (1,))), torch.arange(n) * 1000 // n
        model(x0, t, eps, classes).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    for k, target in enumerate((*exact.components, exact.mixture)):
        found = [float(excess_loss(of_class(model.predict, j), target, exact.abar, 51).mean()) for j in range(4)]
        assert np.argmin(found) == k, found


def images(n: int) -> ImageExperiment:
    """Images that are all of the grey level of their class, which is 0 to 9."""
    classes = np.arange(n, dtype=np.uint8) * 7 % 10
    grey = np.broadcast_to(classes[:, None, None, None], (n, 8, 8, 1)).copy()
    model = ClassUnetSettings(dim=8, dim_mults=(1, 2))
    loaded = {"train": (grey, classes), "test": (grey[::-1], classes[::-1])}
    return ImageExperiment(loaded.__getitem__, (8, 8, 1), "images", model, DiffusionSettings(), 10)


def test_a_held_out_image_comes_with_its_class_or_none_as_often_as_in_training() -> None:
    experiment = images(500)
    x0, classes = experiment.held_out()
    known = classes < 10
    assert 0.86 < float(known.double().mean()) < 0.94  # a tenth is left out
    assert np.array_equal(experiment.to_array(x0)[known, 0, 0, 0], classes[known])


def test_an_image_comes_with_its_class_and_the_networks_weights_are_the_librarys() -> None:
    experiment = images(50)
    for step in (1, 4):
        x0 = experiment.batch(3, step, 5, 20, 32, CPU)
        assert np.array_equal(experiment.to_array(x0)[:, 0, 0, 0], experiment.classes(3, step, 5, 20, 32))
    torch.manual_seed(0)
    model = experiment.build_model().requires_grad_(False)
    theirs = Unet(8, 10, dim_mults=(1, 2), channels=1)
    theirs.load_state_dict(model.network.state_dict())
    xt, t, classes = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([3, 9, 0, 3])
    for guidance in (1.5, 6.0):
        scaled, without = theirs.forward_with_cond_scale(
            xt, t, classes=classes, cond_scale=guidance, remove_parallel_component=False
        )
        torch.testing.assert_close(guided(model.predict, classes, 10, guidance)(xt, t), scaled, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.predict(xt, t), without, rtol=1e-3, atol=1e-4)
