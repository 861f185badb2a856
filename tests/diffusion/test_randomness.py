"""Random numbers depend on (seed, stream, step, index) and on nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from diffusion.process.randomness import BLOCK, Stream, generator, normal, permutation, uniform


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_any_split_of_the_batch_draws_the_same_bytes(parts: int) -> None:
    n = 3 * BLOCK + 17
    whole = normal(5, Stream.NOISE, 9, 0, n, (2, 3))
    edges = [n * i // parts for i in range(parts + 1)]
    split = [normal(5, Stream.NOISE, 9, a, b, (2, 3)) for a, b in pairwise(edges)]
    assert np.concatenate(split).tobytes() == whole.tobytes()
    assert np.concatenate([uniform(5, Stream.DATA, 1, a, b) for a, b in pairwise(edges)]).tobytes() == (
        uniform(5, Stream.DATA, 1, 0, n).tobytes()
    )


def test_each_part_of_the_address_changes_the_numbers() -> None:
    addresses = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (2**32, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (2**63 - 1, 0, 0, 0),
    ]
    draws = {generator(seed, Stream(stream), step, block).random() for seed, stream, step, block in addresses}
    assert len(draws) == len(addresses)


def test_blocks_and_steps_do_not_overlap() -> None:
    first = normal(0, Stream.NOISE, 0, 0, BLOCK, (784,)).ravel()
    second = normal(0, Stream.NOISE, 0, BLOCK, 2 * BLOCK, (784,)).ravel()
    following = normal(0, Stream.NOISE, 1, 0, BLOCK, (784,)).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / first.size**0.5
    assert abs(np.corrcoef(first, following)[0, 1]) < 5 / first.size**0.5


def test_the_numbers_have_the_distributions_they_are_named_after() -> None:
    assert stats.kstest(normal(3, Stream.NOISE, 1, 0, 50_000), "norm").pvalue > 1e-3
    assert stats.kstest(uniform(3, Stream.TIMESTEP, 1, 0, 50_000), "uniform").pvalue > 1e-3


def test_a_permutation_holds_each_index_once_and_differs_by_epoch() -> None:
    first, second = permutation(0, Stream.EPOCH, 0, 1000), permutation(0, Stream.EPOCH, 1, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert not np.array_equal(first, second)
