"""The table of the bound adds up: its parts are the whole, and its loss is the mean over all timesteps."""

import numpy as np
import pytest

from diffusion.statistics import bits_table
from diffusion.statistics.bits_per_dim import Bound, strata

EDGES = strata(100, 20)
SIZES = np.concatenate([[1], np.diff(EDGES)])


def test_the_terms_add_up_to_the_bound_and_the_loss_is_weighted_by_timesteps() -> None:
    random = np.random.default_rng(0)
    n, strata = 7, len(EDGES) - 1
    bound = Bound(EDGES, random.random(n), random.random((n, strata)), random.random(n), random.random((n, 1 + strata)))
    *parts, whole = bits_table.rows(bound)
    assert sum(float(row["bits"]) for row in parts) == pytest.approx(whole["bits"]) == pytest.approx(bound.total.mean())
    each_t = np.repeat(bound.squared_error.mean(0), SIZES)  # [100]
    assert len(each_t) == 100
    assert whole["loss"] == pytest.approx(each_t.mean())
    assert bits_table.mean_loss(bound).mean() == pytest.approx(each_t.mean())
    assert parts[0]["bits"] == pytest.approx(bound.reconstruction.mean())
    curves = bits_table.curves(bound)
    assert np.dot(curves["bits_per_dim_of_one_t"], SIZES) == pytest.approx(whole["bits"] - bound.prior.mean())
    assert [len(curve) for curve in curves.values()] == [1 + strata] * 3
