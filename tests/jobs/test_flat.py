"""Flat weights are the same network, and their optimizer is that of the single parameters."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from jobs.train.ema import Ema, decay_at
from jobs.train.flat_weights import ALIGNMENT, Flat, FlatAdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 2, 1))
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def strides(network: nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in network.parameters()]


def trained(network: nn.Module, optimizer: torch.optim.Optimizer | FlatAdamW, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        network(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parameters_keep_values_and_strides_and_are_aligned() -> None:
    plain, flat = network(), network()
    before = strides(flat)
    weights = Flat(flat).weights
    torch.testing.assert_close(flat.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert strides(flat) == before
    for parameter in flat.parameters():
        assert parameter.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
        assert parameter.storage_offset() % ALIGNMENT == 0
    assert len(weights) % ALIGNMENT == 0


def test_training_is_that_of_single_parameters_before_and_after_their_checkpoint() -> None:
    """The checkpoint of each continues in the other, as that of an earlier version must."""
    plain, other = network(), network()
    flat = Flat(other)
    flat.place_gradients()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1, fused=True)
    flat_optimizer = FlatAdamW(flat, weight_decay=0.1)
    for _ in range(2):
        trained(plain, plain_optimizer, 3)
        trained(other, flat_optimizer, 3)
        torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)
        state, expected = flat_optimizer.state_dict(), plain_optimizer.state_dict()
        torch.testing.assert_close(state["state"], expected["state"], rtol=1e-5, atol=1e-7)
        # The order, too: with it the file has the bytes that torch's AdamW gives it, and earlier versions have given.
        assert [[*group.items()] for group in state["param_groups"]] == [
            [*group.items()] for group in expected["param_groups"]
        ]
        plain_optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1, fused=True)
        flat_optimizer = FlatAdamW(flat, weight_decay=0.1)
        flat_optimizer.load_state_dict(copy.deepcopy(expected))
        plain_optimizer.load_state_dict(copy.deepcopy(state))


def test_gradients_stay_where_the_optimizer_finds_them() -> None:
    module = network()
    flat = Flat(module)
    gradient, optimizer = flat.place_gradients(), FlatAdamW(flat)
    optimizer.zero_grad()
    module(torch.ones(1, 3, 6, 6)).sum().backward()
    expected = network()
    expected(torch.ones(1, 3, 6, 6)).sum().backward()
    for part, parameter, single in zip(flat.split(gradient), module.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.data_ptr() == part.data_ptr()
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(part, single.grad)
    torch.testing.assert_close(flat.join(flat.split(gradient)), gradient, rtol=0, atol=0)


@pytest.mark.parametrize("change", [lambda p: p.requires_grad_(False), lambda p: setattr(p, "data", p.double())])
def test_parameters_of_other_kinds_are_an_error(change: Callable[[nn.Parameter], object]) -> None:
    module = network()
    change(next(module.parameters()))
    with pytest.raises(ValueError, match="one dtype, device and requires_grad"):
        Flat(module)


def test_the_state_of_another_network_is_an_error() -> None:
    flat = Flat(network())
    with pytest.raises(ValueError, match=r"must have the shape \[5\]; got \[1\]"):
        flat.join([part[:1] if part.dim() == 1 else part for part in flat.split(flat.weights)])


def test_an_average_follows_the_weights() -> None:
    module = network()
    flat = Flat(module)
    ema = Ema(module, flat.weights)
    first, expected = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        flat.weights.add_(1)
    ema.update(torch.tensor(1 - decay_at(5, 0.9)))
    for average, old in zip(expected.parameters(), first.parameters(), strict=True):
        average.data = old.detach().lerp(old.detach() + 1, 1 - decay_at(5, 0.9))
    torch.testing.assert_close(ema.network.state_dict(), expected.state_dict())


def test_a_copy_of_the_state_is_one_also_of_buffers_and_tied_weights() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    module[2].weight = module[0].weight
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    copied = Flat(module).state_dict(module)
    expected = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    assert [*copied] == [*expected]
    for name, value in expected.items():
        assert torch.equal(copied[name], value) and copied[name].stride() == value.stride(), name
