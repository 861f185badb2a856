"""Experiments on images, with MNIST, against denoising-diffusion-pytorch and the data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torchvision import datasets

from diffusion.data.mnist import MNIST
from diffusion.images.experiment import ImageExperiment, UnetModel
from diffusion.settings import DiffusionSettings, UnetSettings
from jobs.experiments.table import EXPERIMENTS

CPU = torch.device("cpu")


def experiment(images: int = 100, **settings: object) -> ImageExperiment:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 28, 28, 1), dtype=np.uint8)
    loaded = pixels, np.zeros(images, np.uint8)
    model = UnetSettings(**settings)  # type: ignore[arg-type]
    return ImageExperiment(lambda split: loaded, (28, 28, 1), "digits", model, DiffusionSettings())


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"dim": 64, "dim_mults": (1, 2, 4)}, 9_898_113),
        ({"dim": 32, "dim_mults": (1, 2, 4)}, 2_607_681),
        ({"dim": 16, "dim_mults": (1, 2, 4)}, 721_185),
    ],
)
def test_the_network_has_the_known_number_of_parameters(settings: dict[str, object], parameters: int) -> None:
    model = experiment(**settings).build_model()
    assert sum(p.numel() for p in model.network.parameters()) == parameters


def test_the_loss_equals_the_librarys_forward() -> None:
    torch.manual_seed(0)
    ours = experiment(dim=8, dim_mults=(1, 2)).build_model()
    theirs = GaussianDiffusion(ours.network, image_size=28, objective="pred_noise", beta_schedule="linear")
    images, eps = torch.rand(6, 1, 28, 28), torch.randn(6, 1, 28, 28)
    t = torch.tensor([0, 10, 250, 500, 750, 999])
    with torch.inference_mode():
        loss = ours(images * 2 - 1, t, eps).mean()
        torch.testing.assert_close(loss, theirs(images, times=t, noise=eps), rtol=1e-5, atol=0)


def test_space_to_depth_keeps_the_noise_in_place() -> None:
    """With a network that returns its input, predict must be the identity."""
    model = experiment(dim=8, dim_mults=(1, 2), patch_size=2).build_model()
    assert isinstance(model, UnetModel)
    model.network = _Identity()
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(model.predict(x, torch.zeros(3)), x)


class _Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.shape == (3, 4, 14, 14)
        return x


def test_the_weights_of_mnist_load_strictly_into_the_librarys_unet() -> None:
    model = EXPERIMENTS["mnist"].preset.build().build_model()
    Unet(dim=64, dim_mults=(1, 2, 4), channels=1).load_state_dict(model.network.state_dict(), strict=True)


def test_every_image_comes_once_in_each_epoch_however_the_batch_is_split() -> None:
    mnist, batch_size = experiment(images=96), 32
    flat = mnist.images.flatten(1).numpy()
    indices = {image.tobytes(): i for i, image in enumerate(flat)}
    orders = []
    for epoch in range(2):
        seen: list[int] = []
        for step in range(3 * epoch + 1, 3 * epoch + 4):
            parts = [mnist.batch(7, step, start, start + 8, batch_size, CPU) for start in range(0, batch_size, 8)]
            assert torch.equal(torch.cat(parts), mnist.batch(7, step, 0, batch_size, batch_size, CPU))
            seen += [indices[image.tobytes()] for image in mnist.to_array(torch.cat(parts))]
        assert sorted(seen) == list(range(96))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    mnist = experiment()
    x0 = mnist.batch(0, 1, 0, 100, 100, CPU)
    assert x0.min() >= -1
    assert x0.max() <= 1
    order = [mnist._index(0, i) for i in range(100)]
    assert np.array_equal(mnist.to_array(x0)[..., 0], mnist.images[order, 0].numpy())


def test_images_are_the_ones_that_torchvision_reads(mnist_root: Path) -> None:
    theirs = datasets.MNIST(str(mnist_root), train=True, download=False)
    assert np.array_equal(MNIST.read_images(mnist_root, "train")[..., 0], theirs.data.numpy())
    assert np.array_equal(MNIST.read_labels(mnist_root, "train"), theirs.targets.numpy())
