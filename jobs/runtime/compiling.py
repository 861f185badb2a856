"""Compiling a network with torch.compile, into the same code at each start."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jobs.runtime.job import JobError


@contextmanager
def compiling(network: nn.Module) -> Iterator[None]:
    """The network's first call in here compiles it, for inputs like its own; later ones, also outside, run that.

    Raises JobError if that fails; usually there is no C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException  # here, because they take seconds to import
    from torch._inductor import config as inductor

    # What the process has compiled for another network would decide over what is compiled now.
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    # Inductor would time kernels at each start and take the fastest; older versions have no such switch. It is an
    # option because that holds for backward passes, too: torch resets the module's variable after each graph.
    network.compile(options={"deterministic": True} if hasattr(inductor, "deterministic") else None)
    try:
        yield
    except TorchDynamoException as error:
        reason, _, _ = str(error).partition("\n\n")  # then comes advice for torch's own developers
        raise JobError(f"the network cannot be compiled on this machine: {' '.join(reason.split())}") from error


def compiled_at_first(
    network: nn.Module, function: Callable[..., Tensor], done: Callable[[float], None]
) -> Callable[..., Tensor]:
    """Returns a function that calls the network, as one whose first call compiles it; `done` hears the seconds.

    That call raises JobError as `compiling` does.
    """
    is_compiled = False

    def call(*inputs: Tensor) -> Tensor:
        nonlocal is_compiled
        if is_compiled:
            return function(*inputs)
        started = time.perf_counter()
        with compiling(network):
            found = function(*inputs)
        is_compiled = True
        done(time.perf_counter() - started)
        return found

    return call
