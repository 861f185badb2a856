"""A CUDA graph for a CPU: the operations of a function, recorded once and repeated at the same places in memory.

As on a GPU, what Python decides or reads while the function runs is decided for good, and waiting for a result is
refused.
"""

from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.process.cuda_graphs import WARM_UP


def _refuse(*arguments: object) -> NoReturn:
    raise RuntimeError("a graph cannot wait for a number")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            _refuse()
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))  # which keeps all tensors, so no memory is used twice
        return made


class Recorded:
    """Stands in for `diffusion.process.cuda_graphs.Captured` where tensors are on a CPU."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        for _ in range(WARM_UP):
            function(*self._inputs)
        refused = (mock.patch.object(Tensor, name, _refuse) for name in ("tolist", "numpy"))
        with _Recorder() as recorder, next(refused), next(refused):
            self._outputs = function(*self._inputs)
        self._calls = recorder.calls

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        for func, args, kwargs, made in self._calls:
            for place, result in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)
        return tuple(tensor.clone() for tensor in self._outputs)
