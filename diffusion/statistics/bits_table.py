"""Tables and curves by timestep: the variational bound of held-out images, and the loss that training minimises."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.statistics.bits_per_dim import Bound, mean_and_error
from diffusion.statistics.bootstrap import Floats

BANDS = (0, 1, 10, 100, 300, 1_000_000)
"""Timesteps at which the table is cut."""


def mean_loss(bound: Bound) -> Floats:
    """The loss of each image, [n]: the squared error of the noise, averaged over all timesteps."""
    sizes = _sizes(bound)
    return bound.squared_error @ sizes / sizes.sum()


def rows(bound: Bound) -> list[dict[str, str | float]]:
    """Bits per dimension of each term with their standard errors, and the loss, in bands of timesteps."""
    sizes, starts = _sizes(bound), _starts(bound)
    ends = starts + sizes
    terms = np.column_stack([bound.reconstruction, bound.transitions])
    found: list[dict[str, str | float]] = []
    for low, high in pairwise(BANDS):
        chosen = (starts >= low) & (starts < high)
        if not chosen.any():
            continue
        name = "t = 0, reconstruction" if high == 1 else f"t = {starts[chosen][0]} to {ends[chosen][-1] - 1}"
        # Each column counts as often as it stands for timesteps.
        loss = (bound.squared_error[:, chosen] @ sizes[chosen] / sizes[chosen].sum()).mean()
        found.append({**_row(name, terms[:, chosen].sum(1)), "loss": float(loss)})
    found.append({**_row("t = T, prior", bound.prior), "loss": ""})
    found.append({**_row("all", bound.total), "loss": float(mean_loss(bound).mean())})
    return found


def curves(bound: Bound) -> dict[str, Any]:
    """Returns the same for each stratum of timesteps; bits are those of one timestep in it."""
    return {
        "first_t": _starts(bound).tolist(),
        "bits_per_dim_of_one_t": [
            float(bound.reconstruction.mean()),
            *(bound.transitions.mean(0) / _sizes(bound)[1:]).tolist(),
        ],
        "loss": bound.squared_error.mean(0).tolist(),
    }


def _row(name: str, bits: Floats) -> dict[str, str | float]:
    mean, error = mean_and_error(bits)
    return {"term": name, "bits": float(mean), "std_error": float(error)}


def _starts(bound: Bound) -> NDArray[np.int64]:
    """The first timestep that each column of squared_error stands for."""
    return np.concatenate([[0], bound.edges[:-1]])


def _sizes(bound: Bound) -> NDArray[np.int64]:
    """How many timesteps each column stands for."""
    return np.concatenate([[1], np.diff(bound.edges)])
