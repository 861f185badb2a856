"""A device of the tests' own, which behaves like a GPU and needs none: its tensors do not meet those of the CPU.

A tensor that is `Elsewhere` computes on the CPU and gives real values, and claims to be on DEVICE. Where it meets a
tensor of the CPU, the operation fails as on a GPU; `to`, `cpu` and `copy_` go between the two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
MIXED = {
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
    # CUDA takes indices from the CPU, too.
    torch.ops.aten.index.Tensor,
}


class Elsewhere(Tensor):
    """A tensor on DEVICE."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sends what is made on DEVICE, or goes there, the same way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While entered there is DEVICE, which this yields."""
    # What torch's own fake tensors do on a machine without a GPU: there is nothing to initialise or to switch to.
    torch._C._ensureCUDADeviceGuardSet()
    # `module.cpu()` puts other tensors in the place of these, instead of other memory below them.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # Memory is pinned by CUDA's driver.
    pinned = mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor)
    try:
        with mock.patch.object(torch.cuda, "_lazy_init"), pinned, _Mode():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@torch.inference_mode()  # torch makes no views there of wrapped tensors that come from outside
def move(module: nn.Module) -> None:
    """Puts a module's parameters and buffers on DEVICE, as `module.to` does; for computing without gradients."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes on the CPU; the result is where the operation would leave it."""
    tensors: list[Tensor] = []
    devices: list[torch.device] = []

    def held(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            return leaf.held if isinstance(leaf, Elsewhere) else leaf
        if isinstance(leaf, torch.device):
            devices.append(leaf)
            return torch.device("cpu")
        return leaf

    there, (args, kwargs) = args, _mapped(held, (args, kwargs))
    moved = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    # A number in a tensor goes anywhere, as on CUDA.
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim > 0]
    if moved and strangers and func not in MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device; {func} got {DEVICE} and cpu")
    if func is torch.ops.aten.index.Tensor and moved and not isinstance(there[0], Elsewhere):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu); {func}")
    result = func(*args, **kwargs)
    stays = bool(moved) and not (func is torch.ops.aten.copy_.default and not isinstance(tensors[0], Elsewhere))
    if not (DEVICE in devices if devices else stays):
        return result
    owners = {id(tensor.held): tensor for tensor in moved}  # what an operation in place returns is its argument

    def owned(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return owners[id(leaf)] if id(leaf) in owners else Elsewhere(leaf)

    return _mapped(owned, result)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """What an operation takes or returns, each leaf changed; torch's own `tree_map` takes several times as long."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return change(value)
