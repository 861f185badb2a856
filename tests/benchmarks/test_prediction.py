"""The prediction for many GPUs, where it can be worked out by hand."""

import pytest

from benchmarks.prediction import Network, exposed

NETWORK = Network("a byte in a nanosecond, a hop in a microsecond", 1e9, 1e-6)


@pytest.mark.parametrize(
    ("processes", "compute", "expected"),
    [
        (1, 0.0, 0.0),  # alone, nothing is sent
        (2, 0.0, 1e-3 + 2e-6),  # each sends the half twice
        (4, 0.0, 1.5e-3 + 6e-6),
        (4, 1e-3, 1e-3 + 6e-6),  # half of the compute hides a part
        (4, 4e-3, 0.0),
    ],
)
def test_a_ring_sends_nearly_twice_the_gradients(processes: int, compute: float, expected: float) -> None:
    assert exposed(processes, compute, 1e6, NETWORK) == pytest.approx(expected)
