"""Trains the digit classifier: `python -m diffusion.digits.train_classifier` writes digits.safetensors."""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.mnist import CLASSIFIER, MNIST
from diffusion.digits.classifier import SHAPE, DigitNet, check_labels, classify
from diffusion.images.pixels import Images, check_images, to_pixels
from diffusion.process.randomness import Stream, generator, permutation

BATCH_SIZE = 128
NO_DIGITS = 32
LARGEST_LR = 5e-3


def train(
    images: Images, labels: NDArray[np.integer], *, steps: int, seed: int, say: Callable[[str], None] = lambda _: None
) -> DigitNet:
    """A classifier of digits after `steps` batches of 128; the same bytes on the same number of threads.

    AdamW with a one-cycle learning rate (Smith & Topin 2018) on randomly moved images, in shuffled epochs, the last
    batch filled up from the first. With each batch come images that are no digits, a class of their own: without them
    the net takes noise for a digit with certainty.
    """
    check_images(images, shape=SHAPE)
    check_labels(labels, len(images))
    # devices=[], because torch would save and restore the generators of all GPUs, and none is used here.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet().to(memory_format=torch.channels_last).train()
    pixels, targets = to_pixels(images), torch.from_numpy(labels.astype(np.int64))
    no_digit = torch.full((NO_DIGITS,), 10)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_LR, total_steps=steps)
    batches = math.ceil(len(images) / BATCH_SIZE)
    for step in range(steps):
        epoch, i = divmod(step, batches)
        if i == 0:
            order = np.resize(permutation(seed, Stream.EPOCH, epoch, len(images)), (batches, BATCH_SIZE))
        chosen, random = torch.from_numpy(order[i]), generator(seed, Stream.AUGMENTATION, epoch, i)
        x = _moved(pixels[chosen], random)
        loss = F.cross_entropy(net(torch.cat([x, _no_digits(x, random)])), torch.cat([targets[chosen], no_digit]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr.step()
        if step % 100 == 99:
            say(f"step {step + 1} of {steps}: loss {loss.item():.4f}")
    return net.eval()


def _moved(x: Tensor, random: np.random.Generator) -> Tensor:
    """x [n, 1, 28, 28] turned by up to 10 degrees, scaled by up to 10% and shifted by up to 2 pixels."""
    uniforms = torch.from_numpy(random.random((4, len(x)), dtype=np.float32))
    angle, size, right, down = 2 * uniforms - 1
    # affine_grid measures from the middle to the edge: 14 pixels are 1.
    angle, size, shift = angle * math.radians(10), 1 + 0.1 * size, torch.stack([right, down], 1) * 2 / 14
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    affine = torch.cat([size[:, None, None] * turn, shift[:, :, None]], 2)  # [n, 2, 3]
    return F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)


def _no_digits(x: Tensor, random: np.random.Generator) -> Tensor:
    """[NO_DIGITS, 1, 28, 28]: half put together from quarters of four of the digits x, half noise of any strength."""
    half = NO_DIGITS // 2
    a, b, c, d = x[torch.from_numpy(random.integers(0, len(x), (4, half)))]  # each [half, 1, 28, 28]
    upper = torch.cat([a[..., :14, :14], b[..., :14, 14:]], 3)
    lower = torch.cat([c[..., 14:, :14], d[..., 14:, 14:]], 3)
    noise = random.random((half, 1, 28, 28), dtype=np.float32) * random.random((half, 1, 1, 1), dtype=np.float32)
    return torch.cat([torch.cat([upper, lower], 2), torch.from_numpy(noise)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10 * 469, help="batches of 128; an epoch is 469")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CLASSIFIER)
    options = parser.parse_args()
    root = Path(MNIST.default_root())
    MNIST.require(root)
    started = time.process_time()
    images, labels = MNIST.read_images(root, "train"), MNIST.read_labels(root, "train")
    net = train(images, labels, steps=options.steps, seed=options.seed, say=print)
    print(f"{time.process_time() - started:.0f} s of processor time")
    _, probabilities = classify(net, MNIST.read_images(root, "test"))
    right = probabilities.argmax(1) == MNIST.read_labels(root, "test")
    print(f"{right.mean():.2%} of the test digits are right")
    # safetensors takes contiguous tensors alone, and the convolutions have channels last.
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
