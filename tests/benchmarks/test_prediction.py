"""The prediction for many GPUs, where it can be worked out by hand."""

import pytest
import torch

from benchmarks.prediction import Network, exchange, launches_of, work

NETWORK = Network("a byte in a nanosecond, a hop in a microsecond", 1e9, 1e-6)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (1, 0.0),  # alone, nothing is sent
        (2, 1e-3 + 2e-6),  # each sends the half twice
        (4, 1.5e-3 + 6e-6),
    ],
)
def test_an_exchange_sends_nearly_twice_the_gradients(processes: int, expected: float) -> None:
    assert exchange(processes, 1e6, NETWORK) == pytest.approx(expected)


def test_the_slower_of_device_and_host_decides() -> None:
    assert work(compute=10e-3, launches=2000, launch_s=8e-6) == pytest.approx(16e-3)
    assert work(compute=20e-3, launches=2000, launch_s=8e-6) == 20e-3


def test_launches_are_counted_forward_and_backward_but_not_views_and_empty_memory() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    assert launches_of(lambda: x.view(3, 2).t()[1:]) == 0
    assert launches_of(lambda: torch.empty_like(x)) == 0
    assert launches_of(lambda: x.add_(1)) == 1
    assert launches_of(lambda: (x + 1).mul_(2)) == 2
    assert launches_of(lambda: torch.nn.functional.linear(x, weight, bias)) == 1  # addmm, of a transposed view
    # Forward addmm and sum; backward ones like the sum, a product for the weight, and a sum for the bias.
    assert launches_of(lambda: torch.nn.functional.linear(x, weight, bias).sum().backward()) == 5
