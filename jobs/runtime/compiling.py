"""Compiling a network with torch.compile, into the same code at each start."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jobs.runtime.job import JobError


def chooses_in_order() -> bool:
    """Whether this torch compiles into the same code at each start for a GPU, too.

    Otherwise Inductor times kernels and takes the fastest; versions before 2.10 have no such switch.
    """
    from torch._inductor import config

    return hasattr(config, "deterministic")


def compile_by(networks: Sequence[nn.Module], call: Callable[[], object]) -> float:
    """Compiles the networks for inputs like those of this call of them, which is made twice; returns the seconds.

    Raises JobError if that fails; usually there is no C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException  # here, because it takes seconds to import

    started = time.perf_counter()
    # What the process has compiled for other networks would decide over what is compiled now.
    torch.compiler.reset()
    # Libraries (einops) look at their first tensors once, and what was compiled before would be compiled again.
    torch.compiler.set_stance("force_eager")
    call()
    torch.compiler.set_stance("default")
    # No kernels are timed then. It is an option because that holds for backward passes, too: torch resets the module's
    # variable after each graph.
    for network in networks:
        network.compile(options={"deterministic": True} if chooses_in_order() else None)
    try:
        call()
    except TorchDynamoException as error:
        reason, _, _ = str(error).partition("\n\n")  # then comes advice for torch's own developers
        raise JobError(f"the network cannot be compiled on this machine: {' '.join(reason.split())}") from error
    return time.perf_counter() - started


def compiled_at_first(
    networks: Sequence[nn.Module], function: Callable[..., Tensor], done: Callable[[float], None]
) -> Callable[..., Tensor]:
    """Returns a function that calls the networks, as one whose first call compiles them; `done` hears the seconds.

    That call raises JobError as `compile_by` does.
    """
    is_compiled = False

    def call(*inputs: Tensor) -> Tensor:
        nonlocal is_compiled
        if not is_compiled:
            done(compile_by(networks, lambda: function(*inputs)))
            is_compiled = True
        return function(*inputs)

    return call
