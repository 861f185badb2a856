"""CUDA graphs: work that a GPU repeats is captured once, and then launched at once instead of kernel by kernel.

A step has thousands of kernels, and each launch costs the host time. A captured kernel computes the same bytes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2
"""The function is called so often before it is captured: at first, libraries choose kernels and take workspaces."""


class Captured:
    """A function of tensors on a GPU, captured for inputs of these shapes.

    It is called `WARM_UP` times with these inputs and then captured; capturing computes nothing. It must not wait for
    the GPU, and may read only its inputs and tensors that stay at the same place on the GPU. (Autocast keeps copies of
    weights until it is left, so do not leave it between calls.) Raises RuntimeError if the function cannot be captured;
    then it can still be called itself.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        if any(tensor.device.index != torch.cuda.current_device() for tensor in inputs):
            # The graph would be empty, and its outputs those of the last call before it.
            raise RuntimeError("the tensors are on another GPU than CUDA's current one")
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # CUDA cannot capture its default stream
        # The copies above are made by the current stream, and another one would not wait for them.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        previous = torch.cuda.current_stream()
        try:
            # Whatever other threads do on the GPU meanwhile does not belong to the graph.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)
        finally:
            torch.cuda.set_stream(previous)  # torch leaves it at the other one if capturing fails

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns copies of what the function returns; raises ValueError for inputs of another shape or dtype."""
        for place, tensor in zip(self._inputs, inputs, strict=True):
            if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"captured for {list(place.shape)}, {place.dtype}; got {list(tensor.shape)}, {tensor.dtype}"
                )
            place.copy_(tensor)
        self._graph.replay()
        # Copies, because the next replay writes its outputs into the same memory.
        return tuple(tensor.clone() for tensor in self._outputs)


def in_one_launch(function: Callable[..., Tensor], say: Callable[[str], None]) -> Callable[..., Tensor]:
    """Returns the same function of tensors on a GPU, captured at its first call.

    If that fails, it says so and calls the function.
    """
    captured: list[Callable[..., tuple[Tensor, ...]]] = []

    def whole(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (function(*inputs),)

    def call(*inputs: Tensor) -> Tensor:
        if not captured:
            try:
                captured.append(Captured(whole, *inputs))
            except RuntimeError as error:
                say(not_captured(error))
                captured.append(whole)
        return captured[0](*inputs)[0]

    return call


def not_captured(error: RuntimeError) -> str:
    """Returns a sentence for the user: why the work could not be captured, and what follows from it."""
    reason = str(error).partition("\n")[0]
    return f"The GPU's work cannot be captured, so it is launched piece by piece, which takes longer: {reason}"
