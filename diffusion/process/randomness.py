"""Random numbers as pure functions of (seed, stream, step, index), so that nothing random is ever stored.

Philox (Salmon et al. 2011) turns a 128-bit key and a 256-bit counter into numbers. The key is (seed, stream), the
counter starts at (step, block), where a block is `BLOCK` neighbouring examples: whichever process draws examples
[start, stop) of a step gets the same bytes for each of them.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# Examples share a generator: to make one takes longer than to draw the numbers of an image of MNIST.
BLOCK = 256  # never change it: like the numbers of the streams, every run depends on it

T = TypeVar("T", bound=np.generic)


class Stream(IntEnum):
    """What the numbers are for. Never renumber: every run depends on these values."""

    DATA = 0
    COMPONENT = 1
    EPOCH = 2
    TIMESTEP = 3
    NOISE = 4
    SAMPLE_START = 5
    SAMPLE_STEP = 6
    FIGURE = 7
    WEIGHTS = 8
    AUGMENTATION = 9
    BOOTSTRAP = 10
    BOUND = 11
    EVALUATION = 12
    CLASS_DROPOUT = 13
    FLOW = 14


def generator(seed: int, stream: Stream, step: int = 0, block: int = 0) -> np.random.Generator:
    """Returns the generator of one block; `seed` lies in [0, 2^64)."""
    key = np.array([seed, stream], dtype=np.uint64)
    # The generator itself counts in the two low words: each block has 2^128 numbers of its own.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, block, step], dtype=np.uint64)))


def normal(
    seed: int, stream: Stream, step: int, start: int, stop: int, shape: tuple[int, ...] = ()
) -> NDArray[np.float32]:
    """Draws standard normals for examples [start, stop), [stop - start, *shape]."""
    return _blocks(seed, stream, step, start, stop, lambda g, n: g.standard_normal((n, *shape), dtype=np.float32))


def uniform(seed: int, stream: Stream, step: int, start: int, stop: int) -> NDArray[np.float64]:
    """Draws numbers on [0, 1) for examples [start, stop), [stop - start]."""
    return _blocks(seed, stream, step, start, stop, lambda g, n: g.random(n))


def stratified(seed: int, stream: Stream, step: int, start: int, stop: int, batch_size: int) -> NDArray[np.float64]:
    """Draws numbers on [0, 1) for examples [start, stop) of a batch: one in each interval of length 1 / batch_size.

    Each of them alone is uniform. This is a low-discrepancy draw (Kingma et al. 2021, appendix I.1): the mean over a
    batch varies less.
    """
    # The number of example 0, whichever examples are asked for: all of a batch share one offset.
    (offset,) = uniform(seed, stream, step, 0, 1)
    return (offset + np.arange(start, stop) / batch_size) % 1


def permutation(seed: int, stream: Stream, step: int, n: int) -> NDArray[np.int64]:
    """Draws a permutation of 0..n-1."""
    return generator(seed, stream, step).permutation(n)


def _blocks(
    seed: int, stream: Stream, step: int, start: int, stop: int, draw: Callable[[np.random.Generator, int], NDArray[T]]
) -> NDArray[T]:
    parts = []
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        first = block * BLOCK
        # A block's numbers come in order, so a shorter draw is the beginning of a longer one.
        numbers = draw(generator(seed, stream, step, block), min(stop - first, BLOCK))
        parts.append(numbers[max(start - first, 0) :])
    return np.concatenate(parts)
